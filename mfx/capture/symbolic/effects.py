"""Changes of Python state by a trace: put back at its end, and told by the module whose forward makes them."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, fx, nn

from mfx.capture.captured import Effect
from mfx.capture.symbolic.tracer import SymbolicTracer
from mfx.modules.holders import Holder, holder_of, same
from mfx.modules.kept_results import results_not_kept
from mfx.modules.python_state import state_of
from mfx.modules.restore import restored_if_changed
from mfx_passes import paths


class Changes:
    """Changes that traces of a model make beside their graphs.

    A trace that changes nothing is made once. Else a second one, which watches what the first one changed, tells the
    code of which module does so.

    Args:
        model: the model.
        arguments: arguments that are no tensors, by name.
        check: called after each trace, before its changes are put back.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], check: Callable[[nn.Module], None]) -> None:
        self._state = state_of(model)
        self._arguments = [holder for name, value in arguments.items() for holder in _holders_in(value, name)]
        self._model, self._check = model, check
        self._holders: list[Holder] = []
        self._others: list[str] = []
        self._written: list[Tensor] = []

    def trace(self, tracer: SymbolicTracer) -> fx.Graph:
        """Trace the model, and put back what that changes."""
        context, now = contextvars.copy_context(), contextvars.copy_context()
        try:
            with restored_if_changed() as self._written:
                with results_not_kept(self._state, tracer.refuse_kept_result):
                    graph = context.run(tracer.trace, self._model)
                self._check(self._model)
                return graph
        finally:
            changed = [holder for holder in self._arguments if holder.changed()]
            for holder in changed:
                holder.put_back()
            self._holders = [*self._state.put_back(), *changed]
            self._others = [f"the context variable {var.name}" for var in context if now.get(var) is not context[var]]

    @property
    def functions(self) -> Collection[FunctionType]:
        """The functions that the model's code may call, by their names."""
        return self._state.functions

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the model's code could refer to before any trace, but parameters and buffers."""
        return self._state.tensors()

    @property
    def assigned(self) -> dict[nn.Module, set[str]]:
        """Names of the attributes that are changed, or lead to what is, by module."""
        return self._state.assigned

    def __bool__(self) -> bool:
        return bool(self._holders or self._others or self._written)

    def trace_again(self, tracer: SymbolicTracer) -> tuple[fx.Graph, list[Effect]]:
        """Trace the model as before, and tell which module changes what."""
        watched = {holder.key: holder for holder in self._holders}
        last = {key: holder.before for key, holder in watched.items()}
        writers: dict[tuple[int, str], set[str]] = {}
        tensors: list[tuple[Tensor, str]] = []

        def look(path: str) -> None:
            for key, holder in watched.items():
                if not same(now := holder.kind.read(holder.value), last[key]):
                    writers.setdefault(key, set()).add(path)
                    last[key] = now
            tensors.extend((tensor, path) for tensor in self._written[len(tensors) :])

        tracer.at_boundary = look
        try:
            graph = self.trace(tracer)
        finally:
            last.clear()  # traced values are among it
        effects = [Effect("", name, is_own=False) for name in self._others]
        for holder in self._holders:
            of_code = sorted(writers.get(holder.key, {""}))
            effects += [self._effect(holder.value, holder.name, path) for path in of_code]
        effects += [self._effect(t if t._base is None else t._base, "", path) for t, path in tensors]
        return graph, list(dict.fromkeys(effects))

    def _effect(self, value: Any, name: str, path: str) -> Effect:
        owners = self._state.owners(value)
        held = [paths.join(self._state.path_of(module), n) for module, names in owners.items() for n in sorted(names)]
        is_own = any(paths.is_inside(self._state.path_of(module), path) for module in owners)
        return Effect(path, name or next(iter(held), "a tensor from outside of the model"), is_own)


def _holders_in(value: Any, name: str) -> Iterator[Holder]:
    """Yield the containers in an argument, all of plain values; a frozen one holds no other."""
    if (holder := holder_of(value, f"the argument {name}")) is not None:
        yield holder
        for item in holder.before:
            yield from _holders_in(item, name)
