"""Observes a training step on tensors without values: the bytes alive, their peak, and recomputed work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from typing_extensions import override

from mfx.engine import ChainPlan, ChainSettings
from mfx.engine.memory.flops import FlopCounter
from mfx.ledger import Life, StorageLedger, storages
from mfx.modules.recomputing import recomputing
from mfx.options.gamma import Gamma
from mfx.program.chain_call import Momentum
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.memory_plans import NetPlans

_CPU = torch.device("cpu")

# Operations by which a momentum call inspects values, and their results in a step without faults.
_ANSWERS = {
    torch.ops.aten._local_scalar_dense.default: 0,  # the largest value; 1 if two runs differ
    torch.ops.aten.equal.default: True,  # of a buffer, or of a generator's state, before and after
}


class Observer(StorageLedger):
    """Observes every operation on tensors without values, and the bytes that they would take.

    Where a momentum call inspects values (is one out of range, are two tensors equal), the result is that of a step
    without faults. Where the model does, it fails.

    Args:
        excluded: parameters and buffers; they never count, nor do their gradients.
        counter: counts the floating-point operations.

    Attributes:
        recomputed: operations of recomputation, by chain; a chain inside another's branch counts for both.
    """

    def __init__(self, excluded: Sequence[Tensor], counter: FlopCounter) -> None:
        super().__init__(excluded)
        self._counter = counter
        self.recomputed: dict[str, int] = defaultdict(int)
        self._chains: tuple[str, ...] = ()
        self._in_call = False  # in a momentum call, and not in one of its branches
        self._homes: dict[int, tuple[str, ...]] = {}

    def live_in(self, chain: str) -> int:
        """Return the bytes alive that were allocated in the calls of a chain."""
        return sum(life.size for key, life in self._born.items() if chain in self._homes[key])

    @contextmanager
    def calling(self, chain: str) -> Iterator[None]:
        """Within this context, allocations count for a chain."""
        before, self._chains = self._chains, (*self._chains, chain)
        try:
            with self.in_call(True):
                yield
        finally:
            self._chains = before

    @contextmanager
    def in_call(self, value: bool) -> Iterator[None]:
        """Within this context, values are inspected by momentum calls (True) or by the model (False)."""
        before, self._in_call = self._in_call, value
        try:
            yield
        finally:
            self._in_call = before

    def step(self, chain: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a step's function so that its work counts for the chain when it is recomputed."""

        def run(*args: Any) -> Any:
            before, flops = self._chains, self._counter.flops
            if recomputing() and chain not in before:  # the backward pass runs outside the chain's call
                self._chains = (*before, chain)
            try:
                with self.in_call(False):
                    return function(*args)
            finally:
                self._chains = before
                if recomputing():
                    self.recomputed[chain] += self._counter.flops - flops

        return run

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        if self._in_call and func in _ANSWERS:
            return _ANSWERS[func]
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _CPU}  # whatever device the graph was captured on
        return super().__torch_dispatch__(func, types, args, kwargs)

    @override
    def _storages(self, leaves: Any) -> Iterator[torch.UntypedStorage]:
        return storages(leaves)

    @override
    def _enter(self, key: int, storage: torch.UntypedStorage) -> Life:
        if key not in self._born:
            self._homes[key] = self._chains
        return super()._enter(key, storage)


def as_plain(call: Momentum) -> ChainSettings:
    """Return settings by which a call runs the original model, and keeps what ordinary backpropagation keeps."""
    return replace(call.settings, gamma=Gamma(0, 1), plan=ChainPlan.keep_all(len(call.graphs.steps)))


class Rehearsed(Momentum):
    """A momentum call that reports to an observer.

    Args:
        call: the call.
        observer: the observer.
        settings: how it is run, if not by its own settings.
        plans: the rehearsal's own plans for a memory budget; None if the budget is all or nothing.
    """

    def __init__(
        self, call: Momentum, observer: Observer, settings: ChainSettings | None, plans: NetPlans | None
    ) -> None:
        self.__dict__.update(call.__getstate__())  # a copy that shares no mutable state
        self.plans = plans if call.plans is not None else None
        if settings is not None:
            self.settings = settings
        self.compiler = self._watched
        self.observer = observer

    def _watched(self, graph: Graph) -> Callable[..., Any]:
        return self.observer.step(self.chain, to_function(graph))

    @override
    def forward(self, *args: Any, compiler: GraphCompiler | None = None, **kwargs: Any) -> Any:
        with self.observer.calling(self.chain):
            return super().forward(*args, **kwargs)
