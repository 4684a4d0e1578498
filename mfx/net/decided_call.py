"""A call of a net whose graphs are for one path each: run on the path that was taken last, else on the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.captured import CaptureError, RaisedError
from mfx.capture.decisions import Decision, Guesses, MispredictedError
from mfx.capture.outputs import outputs_held
from mfx.modules.aside import aside
from mfx.modules.call_state import CallState
from mfx.modules.recomputing import on_trial
from mfx.program.rewritten import RewrittenGraph
from mfx.text import listed
from mfx_passes import MfxError

_USES = count(1)

Path = tuple[Decision, ...]


def run_decided(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    find: Callable[[Path], RewrittenGraph],
    run: Callable[[RewrittenGraph], Any],
    warn: Callable[[str], None],
) -> Any:
    """Run a call by the graph of the path that its values lead to.

    A graph of another path finds out at the first condition that is not its own. What the call has changed by then is
    put back, and a graph that has these conditions follows.

    Where the caller observes the operations of a call (a checkpoint, a profiler, the chain of another net), it is to
    see those of the right path only. There the path is found beforehand, by calls on trial, which are undone.

    Args:
        net: the net.
        args: arguments of the call.
        kwargs: arguments by name.
        find: returns a graph whose path begins with these decisions.
        run: runs a graph.
        warn: warns, once per message.

    Raises:
        NoGraphError: there is no graph for the path.
        MfxError: a call cannot be undone, or does not take the same path twice.
    """
    path: Path = ()
    for _ in range(Guesses.LIMIT):
        graph = _found(find, path)
        if not graph.decisions or not compat.runs_for_real():
            return run(graph)
        before = _state(net, args, kwargs, graph)
        is_observed = compat.is_observed()
        try:
            with outputs_held() as drop_outputs, _tried(net) if is_observed else nullcontext():
                try:
                    result = run(graph)
                except MispredictedError:
                    drop_outputs()
                    raise
                if is_observed:
                    drop_outputs()
        except MispredictedError as error:
            before.put_back()
            path = (*graph.decisions[: error.number], replace(graph.decisions[error.number], value=error.value))
            _warn_of_hooks(net, warn)
            continue
        graph.last_use = next(_USES)
        if is_observed:
            before.put_back()
            _warn_of_hooks(net, warn)
            result = _run_again(net, graph, run)
        return result
    raise NoGraphError from CaptureError(
        f"{type(net).__name__} takes another path, by conditions on the values of tensors, each time it is run."
    )


class NoGraphError(Exception):
    """There is no graph for a call; the cause is the CaptureError that says why."""


def _found(find: Callable[[Path], RewrittenGraph], path: Path) -> RewrittenGraph:
    try:
        return find(path)
    except RaisedError as error:
        raise error.__cause__ or error from None
    except CaptureError as error:
        raise NoGraphError from error


def _state(net: nn.Module, args: Any, kwargs: Any, graph: RewrittenGraph) -> CallState:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return CallState(net, tensors, python=bool(graph.captured.effects or graph.captured.leaves))


@contextmanager
def _tried(net: nn.Module) -> Iterator[None]:
    with aside(net), torch.no_grad(), on_trial():
        yield


def _run_again(net: nn.Module, graph: RewrittenGraph, run: Callable[[RewrittenGraph], Any]) -> Any:
    try:
        return run(graph)
    except MispredictedError as error:
        raise MfxError(
            f"{type(net).__name__} does not take the same path twice for the same call, which an observer of its "
            f"operations (a checkpoint, a cache) would have to see. {error}"
        ) from error


def _warn_of_hooks(net: nn.Module, warn: Callable[[str], None]) -> None:
    hooked = ["all modules"] * bool(compat.global_hooks())
    hooked += [path or "the net" for path, module in net.named_modules() if any(compat.forward_hook_tables(module))]
    if hooked:
        warn(
            f"forward hooks on {listed(hooked)} may run again: {type(net).__name__} takes decisions on the values of "
            "tensors, and a call that was not on the path expected, or is observed (by a profiler, a mode, a "
            "checkpoint), is made anew. What the hooks did cannot be undone; mfx.recomputing() is true where an "
            "observed call is tried."
        )
