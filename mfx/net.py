"""The forward of a momentumized net: finds, or makes, the rewritten graph that fits a call, and runs it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from mfx import compat
from mfx.arguments import bind, check_signature, key_of, specialize, specialize_defaults
from mfx.capture import Specialization, capture, signature_of
from mfx.entry import Entry, make_entry, steps_of
from mfx.guard import without_marks
from mfx.options import Options
from mfx.probe import find_with_shapes
from mfx.sharding import refuse_containers
from mfx.tree import M, Overlay, tree_copy
from mfx_passes import MfxError

_KEPT = 8  # graphs per set of arguments; a model whose attributes follow a schedule needs a new one for every value
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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

    @property
    def __code__(self) -> CodeType:
        return type(self.net).forward.__code__  # torch.export names inputs after its variables

    @property
    def all_entries(self) -> list[Entry]:
        """Every rewritten graph there is, oldest first within a set of arguments."""
        return [entry for entries in self.entries.values() for entry in entries]

    def _original(self) -> Callable[..., Any]:
        return type(self.net).forward.__get__(self.net)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the net on these arguments, by the rewritten graph that fits them."""
        if self.bypassed:
            return self._original()(*args, **kwargs)
        arguments = bind(self.net, self.__signature__, args, kwargs)
        entry = self._fitting(arguments)
        self._activate(entry)
        self._mention_hooks(entry)
        return entry.run(self.net, arguments)

    def entry_for(self, *args: Any, **kwargs: Any) -> Entry:
        """The rewritten graph that a call with these arguments runs, or would run.

        Raises:
            MfxError: the model cannot be captured for them.
        """
        return self._fitting(bind(self.net, self.__signature__, args, kwargs))

    def prepare(self) -> Entry:
        """Capture and rewrite for the net's present training mode and default arguments, before any call.

        Raises:
            MfxError: the model cannot be captured, or an option names a chain that it does not have.
        """
        entry = self._entry(specialize_defaults(self.__signature__))
        self.options.check_chains(entry.shape)
        self._activate(entry)
        self._mention_hooks(entry)
        return entry

    def _fitting(self, arguments: Mapping[str, Any]) -> Entry:
        entry = self._entry(specialize(arguments))
        return entry if entry.probed else self._probe(entry, arguments)

    def _entry(self, specialization: Specialization) -> Entry:
        key = key_of(self.net, specialization)
        for entry in self.entries.get(key, ()):
            if entry.holds():
                return entry
        self._forget_replaced_modules()
        entry = self._capture(specialization)
        self._check_same_function(entry)
        self.entries[key] = [*self.entries.get(key, ()), entry][-_KEPT:]
        return entry

    def _capture(self, specialization: Specialization) -> Entry:
        with without_marks(self.net) as marks:
            captured = capture(self.net, specialization)
        entry = make_entry(self.net, captured, self.options, {}, marks)
        self._mention_marks(entry)
        return entry

    def _forget_replaced_modules(self) -> None:
        for entries in self.entries.values():
            entries[:] = [entry for entry in entries if entry.in_place()]

    def _check_same_function(self, entry: Entry) -> None:
        """Whatever mode the modules are in, the chains must be the same, or training would train another network."""
        for other in self.all_entries:
            comparable = other.probed == entry.probed and other.captured.specialization == entry.captured.specialization
            if comparable and other.shape != entry.shape:
                raise MfxError(
                    f"{type(self.net).__name__} has other chains in {_mode(entry)} mode than in {_mode(other)} mode "
                    f"({entry.shape} and {other.shape}, by number of steps), so the network that is trained would not "
                    "be the one that is evaluated. Use only= or skip= to leave out what differs."
                )

    def _probe(self, entry: Entry, arguments: Mapping[str, Any]) -> Entry:
        """At an entry's first call, drop the steps that do not fit the shapes of real inputs."""
        if not compat.runs_for_real():
            return entry
        with torch.no_grad():  # nothing for autograd, nor for a checkpoint around this call, to save
            found = find_with_shapes(self.net, entry.captured, self.options, arguments)
        reasons = {} if found is None else {rejection.node.name: rejection.reason for rejection in found.rejections}
        steps = steps_of(entry.findings(self.net, self.options))
        refused = {name: reasons[name] for name in steps if name in reasons}
        better = make_entry(self.net, entry.captured, self.options, refused, entry.marks) if refused else entry
        better.probed = True
        for entries in self.entries.values():
            entries[:] = [better if old is entry else old for old in entries]
        for name, reason in refused.items():
            self._warn(f"the residual add {name} in {steps[name].path or 'the model'} is left as it was: {reason}.")
        if found is not None:
            self._check_same_function(better)
        return better

    def _activate(self, entry: Entry) -> None:
        if entry is self.active:
            return
        self.active = entry
        shown = {
            "graph": entry.graph,
            "code": entry.graph.python_code("self").src,
            "print_readable": self.print_readable,
        }
        for name, value in shown.items():
            if name in self.shown or not hasattr(self.net, name):
                self.net.__dict__[name] = value
                self.shown = tuple(dict.fromkeys((*self.shown, name)))

    def print_readable(self, *args: Any, **kwargs: Any) -> str:
        """The active rewritten graph as Python code; see `torch.fx.GraphModule.print_readable`."""
        entry = self.prepare() if self.active is None else self.active
        return entry.graph_module(self.net).print_readable(*args, **kwargs)

    def graphs(self) -> dict[str, fx.GraphModule]:
        """The rewritten graphs, named after the training mode they are for; ``train#2`` for other arguments."""
        modules: dict[str, fx.GraphModule] = {}
        for entry in self.all_entries:
            base = _mode(entry)
            count = sum(name.split("#")[0] == base for name in modules)
            modules[base if count == 0 else f"{base}#{count + 1}"] = entry.graph_module(self.net)
        return modules

    def _mention_hooks(self, entry: Entry) -> None:
        walked = entry.captured.walked
        hooked = [path for path in entry.flat if path and path in walked and _has_hooks(walked[path])]
        refuse_containers(self.net, hooked, entry.read)
        new = [path for path in hooked if path not in self._warned]
        if new:
            self._warned.update(new)
            self._warn(
                f"hooks on {_listed(new)} will not run: sums in there are part of a momentum chain, so these modules "
                "are not called as a whole. Put the hooks on modules inside a branch."
            )

    def _mention_marks(self, entry: Entry) -> None:
        walked = entry.captured.walked
        flat = {walked[path]: path for path in ("", *entry.flat) if path in walked}
        lost = [
            f"{flat[module]}.{name}".strip(".")
            for module, names in entry.marks.items()
            if module in flat
            for name in sorted(names)
        ]
        if lost:
            self._warn(
                f"{type(self.net).__name__}.forward sets {_listed(lost)}, which the rewritten net does not do: these "
                "modules are not called as a whole. Return such values instead."
            )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"mfx: {message}", stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bypassed": 0}  # a copy made inside mfx.original is no part of that context


def forward_of(net: nn.Module) -> RewrittenForward | None:
    """The rewritten forward of a module, also if somebody wrapped it; None if the module has not been momentumized."""
    for forward in _unwrapped(net.__dict__.get("forward")):
        if isinstance(forward, RewrittenForward):
            return forward
    return None


def net_of(model: M) -> M:
    """A tree copy of a model that is called the way its class says.

    Raises:
        MfxError: its forward was compiled or replaced, or takes inputs without names; or it cannot be copied.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise MfxError("a ScriptModule has no Python code to trace. Momentumize the model before it is scripted.")
    if "forward" in model.__dict__ and not isinstance(model.__dict__["forward"], Overlay):
        raise MfxError(
            f"the forward of this {type(model).__name__} has been replaced on the instance (torch.compile, accelerate "
            "and others do so). Momentumize the model first, and wrap what that returns."
        )
    check_signature(model, signature_of(model))
    return tree_copy(model)


def described(value: object) -> str:
    """What was given in a module's place, for messages."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _unwrapped(forward: Any) -> Iterator[Any]:
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def _mode(entry: Entry) -> str:
    return "train" if entry.training else "eval"


def _has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__[table] for table in _HOOKS)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
