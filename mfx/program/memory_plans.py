"""One forward pass of a whole net under a memory budget: its chains share what one plan for all of them says."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from mfx.compat import NO_TASK, autocast_state, current_task
from mfx.engine import ChainCost, ChainPlan, NetPlan, StepCost, enclosing_keeps, make_plan
from mfx.engine.memory.cuts import SegmentCost, choose_cuts
from mfx.options.memory_budget import MemoryBudget

_KEPT = 256  # plans; one is a few numbers per step


@dataclass
class ChainShare:
    """What one call of a chain does, and where it reports what its steps cost if nobody knows that yet.

    For what lies between two chains: ``cuts``, the pieces it runs in, or ``run``, what its nodes came to.
    """

    plan: ChainPlan | None
    costs: list[StepCost] | None
    cuts: tuple[int, ...] = ()
    run: SegmentCost | None = None


@dataclass
class _Plan:
    calls: tuple[Hashable, ...]
    cuts: tuple[tuple[int, ...], ...]
    net: NetPlan


@dataclass
class _Pass:
    """The calls of chains in one forward pass, in order."""

    plan: _Plan | None
    calls: list[Hashable] = field(default_factory=list)
    shares: list[ChainShare] = field(default_factory=list)
    states: list[tuple[float, ...] | None] = field(default_factory=list)

    def share(self, call: Hashable, states: tuple[float, ...] | None) -> ChainShare:
        number = len(self.calls)
        self.calls.append(call)
        self.states.append(states)
        if self.plan is None:
            share = ChainShare(None, [])
        elif self.fits():
            share = ChainShare(self.plan.net.chains[number], None, self.plan.cuts[number])
        else:
            share = ChainShare(None, None)
        self.shares.append(share)
        return share

    def fits(self) -> bool:
        """Whether this pass has gone as the one that the plan was made for."""
        return self.plan is not None and self.plan.calls[: len(self.calls)] == tuple(self.calls)

    def make_plan(self, budget: MemoryBudget) -> _Plan:
        shares = self.shares
        costs = [ChainCost(tuple(s.costs or ()), t) for s, t in zip(shares, self.states, strict=True)]
        runs = {number: share.run for number, share in enumerate(shares) if share.run is not None}
        at_once = max((s.saved for n, cost in enumerate(costs) for s in cost.steps if n not in runs), default=0)
        cuts: list[tuple[int, ...]] = [()] * len(costs)
        for number, found in zip(runs, choose_cuts([*runs.values()], at_once), strict=True):
            cuts[number], costs[number] = found, runs[number].cost(found)
        return _Plan(tuple(self.calls), tuple(cuts), make_plan(costs, fraction=budget.share, limit=budget.size))


class _Now(threading.local):
    opened: _Pass | None = None


_now = _Now()


class NetPlans:
    """The plans of one net, by what it is called on.

    The first pass of a kind keeps as little as can be and watches what each step costs; from the second on the plan
    made of that holds.

    Args:
        budget: of the net.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._plans: dict[Hashable, _Plan] = {}
        self._coming: dict[Hashable, _Plan] = {}
        self._warned = False

    @contextmanager
    def forward_pass(self, key: Hashable) -> Iterator[None]:
        """A forward pass; ``key`` is whatever its shapes depend on. Inside another pass it is part of that one."""
        inside = _now.opened is not None or enclosing_keeps() is not None
        if inside or key is None or not torch.is_grad_enabled():
            yield
            return
        if current_task() == NO_TASK and key in self._coming:
            # Not within a backward pass, where a checkpoint around the net repeats a pass from before there was a plan.
            self._plans[key] = self._coming.pop(key)
        opened = _now.opened = _Pass(self._plans.get(key))
        try:
            yield
        finally:
            _now.opened = None
        self._learn(key, opened)

    def _learn(self, key: Hashable, done: _Pass) -> None:
        if done.plan is not None:
            if not done.fits() and done.calls:
                self._plans.pop(key, None)  # it has other chains than it had: look again
            return
        if not any(share.costs for share in done.shares):
            return
        budget, coming = self.budget, done.make_plan(self.budget)
        self._coming[key], plan = coming, coming.net
        for table in (self._coming, self._plans):
            while len(table) > _KEPT:
                del table[next(iter(table))]
        if budget.share is None and plan.kept > budget.size and not self._warned:
            self._warned = True
            warnings.warn(
                f"mfx: memory_budget={budget}: this net cannot do with less than {round(plan.kept)} bytes between "
                "forward and backward, and keeps those. Use a smaller "
                "batch, or recompute='all', which runs what lies between the chains again, too.",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_coming": {}}


def call_key(arguments: Any, *, training: bool = True) -> Hashable:
    """What the shapes in a forward pass depend on; None if they are not known."""
    tensors = [leaf for leaf in tree_iter(arguments) if isinstance(leaf, Tensor)]
    if not all(type(size) is int for tensor in tensors for size in tensor.shape):
        return None
    shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
    devices = sorted({"cpu", *(tensor.device.type for tensor in tensors)})
    cast = tuple(autocast_state(device) for device in devices if torch.amp.is_autocast_available(device))
    return shapes, cast, training


def share_of(call: Hashable, states: tuple[float, ...] | None) -> ChainShare | None:
    """What the pass that is under way has for one call of a chain; None if there is none, or inside of a chain.

    Args:
        call: what the call depends on: the chain and the shapes.
        states: see `ChainCost`.
    """
    if _now.opened is None or enclosing_keeps() is not None:
        return None
    return _now.opened.share(call, states)
