"""The forward of a momentumized net: finds, or makes, the rewritten graph that fits a call, and runs it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from mfx_passes import MfxError
from torch import fx, nn

from mfx import compat
from mfx.capture import (
    Captured,
    Specialization,
    capture,
    default_specialization,
    signature_of,
)
from mfx.entry import Entry, make_entry, steps_of
from mfx.options import Options
from mfx.probe import find_with_shapes
from mfx.tree import Overlay


class RewrittenForward(Overlay):
    """Stands in a net's ``__dict__`` as ``forward``, in front of its class's.

    It keeps a table of rewritten graphs: one per training mode and per set of arguments that are no tensors.

    Args:
        net: the tree copy that it is the forward of.
        options: how chains are rewritten.
    """

    def __init__(self, net: nn.Module, options: Options) -> None:
        self.net = net
        self.options = options
        self.bypassed = 0
        self.entries: dict[Hashable, list[Entry]] = {}
        self.active: Entry | None = None
        self._warned: set[str] = set()

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(self.net)

    @property
    def __name__(self) -> str:
        return "forward"

    def _original(self) -> Callable[..., Any]:
        return type(self.net).forward.__get__(self.net)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.bypassed:
            return self._original()(*args, **kwargs)
        arguments = self._bind(args, kwargs)
        entry = self._fitting(arguments)
        self._activate(entry)
        return entry.run(self.net, arguments)

    def entry_for(self, *args: Any, **kwargs: Any) -> Entry:
        """The rewritten graph that a call with these arguments runs, or would run.

        Raises:
            MfxError: the model cannot be captured for them.
        """
        return self._fitting(self._bind(args, kwargs))

    def prepare(self) -> Entry:
        """Capture and rewrite for the net's present training mode and default arguments, before any call.

        Raises:
            MfxError: the model cannot be captured.
        """
        entry = self._entry(default_specialization(self.__signature__))
        self._activate(entry)
        return entry

    def _fitting(self, arguments: Mapping[str, Any]) -> Entry:
        entry = self._entry(_specialize(arguments))
        return entry if entry.probed else self._probe(entry, arguments)

    def _bind(self, args: Any, kwargs: Any) -> dict[str, Any]:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _entry(self, specialization: Specialization) -> Entry:
        entries = self.entries.setdefault(_key(specialization), [])
        for entry in entries:
            if entry.holds():
                return entry
        self._forget_replaced_modules()
        entry = self._make(capture(self.net, specialization), {})
        self._check_same_function(entry)
        self.entries[_key(specialization)].append(entry)
        return entry

    def _forget_replaced_modules(self) -> None:
        for entries in self.entries.values():
            entries[:] = [entry for entry in entries if entry.in_place()]

    def _make(self, captured: Captured, refused: Mapping[str, str]) -> Entry:
        entry = make_entry(self.net, captured, self.options, refused)
        for path in entry.flat:
            module = self.net.get_submodule(path)
            if path and (module._forward_hooks or module._forward_pre_hooks):
                self._warn(
                    f"{path} has forward hooks, which will not run: its operations belong to several steps of a momentum "
                    "chain. Put the hooks on a module inside one step."
                )
        return entry

    def _check_same_function(self, entry: Entry) -> None:
        """Training and evaluation must have the same chains, or training would train another network."""
        chains = {call.chain: len(call.graphs.steps) for call in entry.calls.values()}
        for other in (other for entries in self.entries.values() for other in entries):
            others = {call.chain: len(call.graphs.steps) for call in other.calls.values()}
            if other.training != entry.training and other.captured.specialization == entry.captured.specialization:
                if chains != others and not other.refused:
                    raise MfxError(
                        f"{type(self.net).__name__} has other chains in train mode than in eval mode ({others} and {chains}), so "
                        "the network that is trained would not be the one that is evaluated. Use only= or skip= to leave out "
                        "what differs."
                    )

    def _probe(self, entry: Entry, arguments: Mapping[str, Any]) -> Entry:
        """At an entry's first call, drop the steps that do not fit the shapes of real inputs."""
        if not compat.runs_for_real():
            return entry
        entry.probed = True
        found = find_with_shapes(self.net, entry.captured, self.options, arguments)
        if found is None:
            return entry
        reasons = {rejection.node.name: rejection.reason for rejection in found.rejections}
        steps = steps_of(entry.findings(self.net, self.options))
        refused = {name: reasons[name] for name in steps if name in reasons}
        if not refused:
            return entry
        for name, reason in refused.items():
            self._warn(f"the residual add {name} in {steps[name].path or 'the model'} is left as it was: {reason}.")
        better = self._make(entry.captured, refused)
        better.probed = True
        for entries in self.entries.values():
            entries[:] = [better if old is entry else old for old in entries]
        return better

    def _activate(self, entry: Entry) -> None:
        if entry is self.active:
            return
        self.active = entry
        shown = {"graph": entry.graph, "code": entry.graph.python_code("self").src, "print_readable": self.print_readable}
        for name, value in shown.items():
            if not hasattr(type(self.net), name) and name not in self.net._modules:
                self.net.__dict__[name] = value
                self.shown = tuple(dict.fromkeys((*self.shown, name)))

    def print_readable(self, *args: Any, **kwargs: Any) -> str:
        """The active rewritten graph as Python code; see `torch.fx.GraphModule.print_readable`."""
        if self.active is None:
            raise MfxError(f"{type(self.net).__name__} has no captured graph yet; call it once.")
        return self.active.graph_module(self.net).print_readable(*args, **kwargs)

    def graphs(self) -> dict[str, fx.GraphModule]:
        """The rewritten graphs, named after the training mode they are for; ``train#2`` for other arguments."""
        modules: dict[str, fx.GraphModule] = {}
        for entry in (entry for entries in self.entries.values() for entry in entries):
            base = "train" if entry.training else "eval"
            count = sum(name.split("#")[0] == base for name in modules)
            modules[base if count == 0 else f"{base}#{count + 1}"] = entry.graph_module(self.net)
        return modules

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"mfx: {message}", stacklevel=2)


def _specialize(arguments: Mapping[str, Any]) -> Specialization:
    inputs = tuple(name for name, value in arguments.items() if isinstance(value, torch.Tensor))
    constants = {name: value for name, value in arguments.items() if name not in inputs}
    return Specialization(inputs, constants)


def _key(specialization: Specialization) -> Hashable:
    constants = tuple((name, type(value), value) for name, value in specialization.constants.items())
    try:
        hash(constants)
    except TypeError:
        names = [name for name, value in specialization.constants.items() if not isinstance(value, Hashable)]
        raise MfxError(
            f"the argument {', '.join(names)} is neither a tensor nor a plain value; a graph can be captured for tensors, and for "
            "numbers, strings, None and tuples of these."
        ) from None
    return specialization.inputs, constants


def forward_of(net: nn.Module) -> RewrittenForward | None:
    """The rewritten forward of a module, or None if it has not been momentumized."""
    forward = net.__dict__.get("forward")
    return forward if isinstance(forward, RewrittenForward) else None
