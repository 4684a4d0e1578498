"""Plans of a whole net under a memory budget: its chains share one plan per forward pass."""

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
    """The share of one call of a chain, or of a segment between two chains, in the net's plan.

    Attributes:
        plan: what the call's steps keep; None: as little as possible.
        costs: takes in the costs of the steps; None: they are known, or not asked for.
        cuts: of a segment: where to cut it into pieces.
        segment: of a segment: the measured costs of its nodes.
    """

    plan: ChainPlan | None
    costs: list[StepCost] | None
    cuts: tuple[int, ...] = ()
    segment: SegmentCost | None = None


@dataclass
class _Plan:
    calls: tuple[Hashable, ...]
    cuts: tuple[tuple[int, ...], ...]
    net: NetPlan


@dataclass
class _ForwardPass:
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
        """True if the calls so far are those of the pass that the plan was made from."""
        return self.plan is not None and self.plan.calls[: len(self.calls)] == tuple(self.calls)

    def make_plan(self, budget: MemoryBudget) -> _Plan:
        shares = self.shares
        costs = [ChainCost(tuple(s.costs or ()), t) for s, t in zip(shares, self.states, strict=True)]
        segments = {number: share.segment for number, share in enumerate(shares) if share.segment is not None}
        at_once = max((s.saved for n, cost in enumerate(costs) for s in cost.steps if n not in segments), default=0)
        cuts: list[tuple[int, ...]] = [()] * len(costs)
        for number, found in zip(segments, choose_cuts([*segments.values()], at_once), strict=True):
            cuts[number], costs[number] = found, segments[number].cost(found)
        return _Plan(tuple(self.calls), tuple(cuts), make_plan(costs, fraction=budget.share, limit=budget.size))


class _Current(threading.local):
    forward_pass: _ForwardPass | None = None


_current = _Current()


class NetPlans:
    """The plans of one net, by call key.

    The first pass with a new key keeps as little as possible and measures each step. The plan made from that holds from
    the second pass on.

    Args:
        budget: of the net.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._plans: dict[Hashable, _Plan] = {}
        self._next: dict[Hashable, _Plan] = {}
        self._warned = False

    @contextmanager
    def forward_pass(self, key: Hashable) -> Iterator[None]:
        """Enclose a forward pass with this `call_key`. Inside another forward pass it is part of that one."""
        inside = _current.forward_pass is not None or enclosing_keeps() is not None
        if inside or key is None or not torch.is_grad_enabled():
            yield
            return
        if current_task() == NO_TASK and key in self._next:
            # Not within a backward pass: a checkpoint around the net repeats a pass that ran without a plan.
            self._plans[key] = self._next.pop(key)
        this = _current.forward_pass = _ForwardPass(self._plans.get(key))
        try:
            yield
        finally:
            _current.forward_pass = None
        self._learn(key, this)

    def _learn(self, key: Hashable, done: _ForwardPass) -> None:
        if done.plan is not None:
            if not done.fits() and done.calls:
                self._plans.pop(key, None)  # its chains have changed: measure once more
            return
        if not any(share.costs for share in done.shares):
            return
        budget = self.budget
        self._next[key] = made = done.make_plan(budget)
        plan = made.net
        for table in (self._next, self._plans):
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
        return {**self.__dict__, "_plans": {}, "_next": {}}


def call_key(arguments: Any, *, training: bool = True) -> Hashable:
    """Return what the shapes in a forward pass depend on; None if they are symbolic."""
    tensors = [leaf for leaf in tree_iter(arguments) if isinstance(leaf, Tensor)]
    if not all(type(size) is int for tensor in tensors for size in tensor.shape):
        return None
    shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
    devices = sorted({"cpu", *(tensor.device.type for tensor in tensors)})
    cast = tuple(autocast_state(device) for device in devices if torch.amp.is_autocast_available(device))
    return shapes, cast, training


def share_of(call: Hashable, states: tuple[float, ...] | None) -> ChainShare | None:
    """Return the share of one call in the current forward pass; None outside of one, and inside of a chain.

    Args:
        call: what the call depends on: the chain and the shapes.
        states: see `ChainCost`.
    """
    if _current.forward_pass is None or enclosing_keeps() is not None:
        return None
    return _current.forward_pass.share(call, states)
