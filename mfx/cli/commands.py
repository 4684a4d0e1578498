"""The commands: explain, profile, draw, plan and report."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

import mfx
from mfx.capture.captured import CaptureError
from mfx.cli.inputs import make_inputs
from mfx.cli.parser import version
from mfx.cli.spec import build
from mfx.net.forward import forward_of
from mfx.net.views import views_of
from mfx.progress import waiting_for
from mfx.reports.figure_file import check_figure_file
from mfx.reports.page import check_file, page_of, write

_OPTIONS = ("arithmetic", "memory_budget", "recompute", "offload", "velocity", "min_steps", "only", "skip", "capture")


class UsageError(Exception):
    """Words of the command line that do not go together."""


@dataclass(frozen=True)
class CommandSubject:
    """The model of a command, the arguments of a call, and the options of `mfx.momentumize`."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]

    def rewritten(self) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
        """Return the momentumized net, and the inputs to explain or draw it with.

        A net that is not one graph is called once, to capture its modules, and then needs no inputs.
        """
        net = mfx.momentumize(self.model, **self.options)
        if (self.args or self.kwargs) and (forward := forward_of(net)) is not None:
            try:
                forward.table.graph_for(self.args, self.kwargs)
            except CaptureError:
                with torch.no_grad():
                    net(*self.args, **self.kwargs)
            if forward.per_module:
                return net, (), {}
        return net, self.args, self.kwargs

    def profile(self, parsed: Namespace) -> mfx.Profile:
        """Profile the model."""
        how = {"against": parsed.against, "options": self.options, "repeats": parsed.repeats}
        return mfx.profile(self.model, *self.args, **how, **self.kwargs)


def run(parsed: Namespace) -> None:
    """Run the command of a command line.

    Raises:
        MfxError: the command fails.
        UsageError: the words do not go together.
    """
    try:
        COMMANDS[parsed.command](parsed)
    except CaptureError as error:
        if parsed.inputs:
            raise
        raise mfx.MfxError(f"{error} On the command line, inputs are given with --input.") from error


def _subject(parsed: Namespace) -> CommandSubject:
    args, more = parsed.args
    first, kwargs = parsed.kwargs
    if first:
        raise UsageError("--kwargs takes arguments by name, as in 'depth=18'; --args takes the others")
    with waiting_for(f"building {parsed.spec}"):
        model = build(parsed.spec, args, {**more, **kwargs}, parsed.config, parsed.device)
    if parsed.mode is not None:
        model.train(parsed.mode == "train")
    return CommandSubject(model, *make_inputs(parsed.inputs, parsed.device), _options(parsed))


def _options(parsed: Namespace) -> dict[str, Any]:
    given = {name: value for name in _OPTIONS if (value := getattr(parsed, name)) is not None}
    if parsed.gamma is None:
        return given
    gammas: dict[str | None, Any] = {}
    for chain, gamma in parsed.gamma:
        if chain in gammas or {chain, *gammas} >= {None, "*"}:
            raise UsageError(f"--gamma is given twice for {'all chains' if chain in (None, '*') else chain}")
        gammas[chain] = gamma
    if list(gammas) == [None]:
        return {**given, "gamma": gammas[None]}
    rest = {"*": gammas.pop(None, 0.9)} if "*" not in gammas else {}
    return {**given, "gamma": {**gammas, **rest}}


def _explain(parsed: Namespace) -> None:
    net, args, kwargs = _subject(parsed).rewritten()
    explanation = mfx.explain(net, *args, **kwargs)
    if parsed.json:
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        print(explanation.details() if parsed.verbose else explanation)


def _profile(parsed: Namespace) -> None:
    _check_measuring(parsed)
    if parsed.device == "meta":
        raise UsageError("profile computes, which needs values: --device cpu or cuda, not meta")
    _check_picture(parsed)
    profile = _subject(parsed).profile(parsed)
    print(json.dumps(profile.to_dict(), indent=2) if parsed.json else profile)
    if parsed.output is not None:
        profile.plot(parsed.output)


def _draw(parsed: Namespace) -> None:
    net, args, kwargs = _subject(parsed).rewritten()
    mfx.draw(net, parsed.output, *args, **kwargs)
    print(parsed.output)


def _plan(parsed: Namespace) -> None:
    _check_picture(parsed)
    subject = _subject(parsed)
    others = sorted(set(subject.options) - {"gamma"})
    if others:
        raise UsageError(
            f"plan compares ways to train; of the options it takes --gamma, not --{others[0].replace('_', '-')}"
        )
    if subject.args and subject.kwargs:
        raise UsageError("plan takes inputs by position or by name, not both")
    plan = mfx.plan(
        subject.model,
        subject.args or subject.kwargs,
        parsed.gpu_memory,
        world_size=parsed.world_size,
        fsdp=parsed.fsdp,
        sequence_dim=parsed.sequence_dim,
        optimizer_bytes=parsed.optimizer_bytes,
        chip=parsed.chip,
        **subject.options,
    )
    print(json.dumps(plan.to_dict(), indent=2) if parsed.json else plan)
    if parsed.output is not None:
        plan.plot(parsed.output)


def _check_picture(parsed: Namespace) -> None:
    if parsed.output is not None:
        check_figure_file(parsed.output, f"mfx {parsed.command}")


def _report(parsed: Namespace) -> None:
    file = check_file(parsed.output)
    _check_repeats(parsed)
    subject = _subject(parsed)
    net, args, kwargs = subject.rewritten()
    profile, why_not = _measured(parsed, subject)
    page = page_of(
        mfx.explain(net, *args, **kwargs),
        mfx.draw(net, None, *args, **kwargs),
        profile=profile,
        why_no_profile=why_not,
        code=_code(net, args, kwargs),
        facts={"model": parsed.spec, "inputs": _described(subject), "versions": version()},
    )
    write(file, page)
    print(file)


def _measured(parsed: Namespace, subject: CommandSubject) -> tuple[mfx.Profile | None, str]:
    """Return a profile, or None and the reason."""
    if not parsed.inputs:
        return None, "no inputs were given (--input)."
    if parsed.device == "meta":
        return None, "the model is on the meta device, without values."
    try:
        return subject.profile(parsed), ""
    except mfx.MfxError as error:
        return None, str(error)


def _code(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the code of every graph of a net before and after it was rewritten, each with a title."""
    found = []
    for view in views_of(net, args, kwargs, "--input"):
        where = f"{view.title}: " if view.title else ""
        before = view.captured()
        if before is not None and (view.is_whole or view.calls):
            found.append((f"{where}before: as captured", _source(before)))
        if view.calls:
            found.append((f"{where}after: rewritten", _source(view.graph_module().graph)))
    return found


def _source(graph: Graph) -> str:
    """Return a graph as code, without the ``x = None`` that free memory."""
    return re.sub(r";  [\w, =]+ = None$", "", graph.python_code("self").src, flags=re.MULTILINE)


def _described(subject: CommandSubject) -> str:
    given = [*((None, value) for value in subject.args), *subject.kwargs.items()]
    words = [f"{name}={_one(value)}" if name else _one(value) for name, value in given]
    return ", ".join(words) or "none"


def _one(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {'×'.join(map(str, value.shape)) or 'scalar'}"


def _check_measuring(parsed: Namespace) -> None:
    if not parsed.inputs:
        raise UsageError(f"{parsed.command} calls the model: say with what, as in --input 8,3,224,224")
    _check_repeats(parsed)


def _check_repeats(parsed: Namespace) -> None:
    if parsed.repeats < 1:
        raise UsageError(f"--repeats {parsed.repeats}: at least 1")


COMMANDS: Mapping[str, Callable[[Namespace], None]] = {
    "explain": _explain,
    "profile": _profile,
    "draw": _draw,
    "plan": _plan,
    "report": _report,
}
