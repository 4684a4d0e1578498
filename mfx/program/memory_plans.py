"""Plans of a whole net under a memory budget: its chains share one plan per forward pass."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from mfx.compat import NO_TASK, autocast_state, current_task
from mfx.engine import ChainCost, ChainPlan, Mark, StepCost, enclosing_is_recorded, make_plan
from mfx.engine.memory.cuts import SegmentCost, choose_cuts
from mfx.engine.memory.nesting import Place, choose_nesting
from mfx.engine.memory.peak import Lap, PeakSearch, top_of
from mfx.modules.recomputing import RUNNING
from mfx.options.memory_budget import MemoryBudget
from mfx.program.watched_step import WatchedStep
from mfx.text import size
from mfx_passes import MfxError

_IDLE = 8
_KEPT = 256  # kinds of calls; what is kept of one is a few numbers per step


@dataclass
class ChainShare:
    """The share of one call of a chain, or of a segment between two chains, in the net's plan.

    Attributes:
        plan: what the call's steps keep; None: as little as possible.
        costs: takes in the costs of the steps; None: they are known, or not asked for.
        mark: see `ChainCall`; None: the step is not watched.
        cuts: of a segment: where to cut it into pieces.
        segment: of a segment: the measured costs of its nodes.
    """

    plan: ChainPlan | None
    costs: list[StepCost] | None
    mark: Mark | None = None
    cuts: tuple[int, ...] = ()
    segment: SegmentCost | None = None


@dataclass(frozen=True)
class _Measured:
    """The calls of chains in the forward pass that measured them, in order, and their costs."""

    calls: tuple[Hashable, ...]
    costs: tuple[ChainCost, ...]
    cuts: tuple[tuple[int, ...], ...]


@dataclass
class _ForwardPass:
    """The calls of chains in one forward pass, in order.

    Attributes:
        measured: costs that are known; None: those of this pass are measured.
        plans: of the calls; None: they keep as little as possible.
        step: watches the pass.
        around: the step around each call, if it is inside of a chain.
    """

    measured: _Measured | None
    plans: Sequence[ChainPlan] | None
    step: WatchedStep | None
    calls: list[Hashable] = field(default_factory=list)
    shares: list[ChainShare] = field(default_factory=list)
    states: list[tuple[float, ...] | None] = field(default_factory=list)
    around: list[Place | None] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)

    @contextmanager
    def share(self, call: Hashable, states: Callable[[], tuple[float, ...] | None]) -> Iterator[ChainShare]:
        number = len(self.calls)
        self.calls.append(call)
        outer = self._open[-1] if self._open else None
        if self.measured is None:
            share = ChainShare(None, [])
            self.around.append(None if outer is None else (outer, len(self.shares[outer].costs or ())))
            self.states.append(states())
        elif self.plans is not None and self.fits():
            share = ChainShare(self.plans[number], None, cuts=self.measured.cuts[number])
        else:
            share = ChainShare(None, None)
        if self.step is not None and enclosing_is_recorded() in (None, True):
            share.mark = partial(self.step.mark, number)
        self.shares.append(share)
        self._open.append(number)
        try:
            yield share
        finally:
            self._open.pop()

    def fits(self) -> bool:
        """True if the calls so far are those of the pass that costs were measured in."""
        return self.measured is not None and self.measured.calls[: len(self.calls)] == tuple(self.calls)

    def measure(self) -> _Measured:
        """Return the costs that this pass has measured, with what lies between the chains cut into pieces."""
        shares = self.shares
        costs = [ChainCost(tuple(s.costs or ()), t) for s, t in zip(shares, self.states, strict=True)]
        segments = {number: share.segment for number, share in enumerate(shares) if share.segment is not None}
        at_once = max((s.saved for n, cost in enumerate(costs) for s in cost.steps if n not in segments), default=0)
        cuts: list[tuple[int, ...]] = [()] * len(costs)
        for number, found in zip(segments, choose_cuts([*segments.values()], at_once), strict=True):
            cuts[number], costs[number] = found, segments[number].cost(found)
        return _Measured(tuple(self.calls), tuple(choose_nesting(costs, self.around)), tuple(cuts))


class UnreachableError(MfxError):
    """A memory budget in bytes is below what a step takes at the least."""


class _KindOfCall:
    """One kind of call: its costs, and its plan.

    Attributes:
        measured: the costs of its chains; None before its first forward pass.
        plans: of its chains, from the next forward pass on; None: they keep as little as possible.
        is_settled: no step is to be watched any more.
        error: says that the budget cannot be had.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.measured: _Measured | None = None
        self.plans: Sequence[ChainPlan] | None = None
        self.is_settled = budget.share is not None
        self.error: UnreachableError | None = None
        self.idle = 0  # steps in a row that were watched, or might have been, without a backward pass
        self._least = self._least_seen = 0  # the peak where chains keep as little as possible
        self._search: PeakSearch | None = None

    def learn(self, measured: _Measured) -> None:
        """Take in the costs of the first forward pass."""
        self.measured = measured
        if self._budget.share is not None:
            self.plans = make_plan(measured.costs, self._budget.share).chains

    def observe(self, laps: Sequence[Lap]) -> None:
        """Take in the laps of a step that was run by ``plans``."""
        assert self.measured is not None, "costs are measured in the forward pass"
        if self._search is None:
            self._least, self._least_seen = top_of(laps), top_of(laps, seen=True)
            self._search = PeakSearch(self.measured.costs, self._budget.size)
            self.plans = self._search.plans
        elif not self.is_settled:
            is_second, limit = self._search.is_new, self._budget.size
            self._search.observe(laps)
            self.plans, self.is_settled = self._search.plans, self._search.settled
            if is_second and top_of(laps) > limit:
                # Only what runs chains in chains three times takes less, if anything.
                self.plans = None
                self._say_what_is_above(min(self._least, top_of(laps)), min(self._least_seen, top_of(laps, seen=True)))

    def _say_what_is_above(self, least: int, seen: int) -> None:
        if seen > self._budget.size:
            self.error = self._unreachable(seen)
        elif least > self._budget.size:
            warnings.warn(
                f"mfx: memory_budget={self._budget}: with what lies between the net's call and the backward pass, "
                "which is not seen but reckoned from autograd's graph, a training step takes "
                f"{least} bytes ({size(least)}). The net keeps as little as it can.",
                stacklevel=2,
            )

    def _unreachable(self, least: int) -> UnreachableError:
        return UnreachableError(
            f"memory_budget={self._budget}: a training step of this net on such inputs cannot do with less than "
            f"{least} bytes ({size(least)}) of activations at the peak, as its first steps show. Use a smaller batch; "
            "recompute='all', which runs what lies between the chains again, too; gamma=0.9, by which long chains keep "
            "no inputs; offload='cpu'; or a larger budget."
        )


class _Current(threading.local):
    forward_pass: _ForwardPass | None = None


_current = _Current()


class NetPlans:
    """The plans of one net, by call key.

    The first pass with a new key keeps as little as possible and measures each step. Under a share, and where there
    are chains in chains, the plan made from that holds from the second pass on. A number of bytes is a bound on the
    peak: two steps that keep as little as possible are watched, and then those by whose laps the plan grows.

    Args:
        budget: of the net.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._kinds: dict[Hashable, _KindOfCall] = {}
        self._plans: dict[Hashable, Sequence[ChainPlan] | None] = {}  # of the last forward pass
        self._watched: WatchedStep | None = None

    @contextmanager
    def forward_pass(self, key: Hashable, watched: Callable[[], WatchedStep]) -> Iterator[None]:
        """Enclose a forward pass with this `call_key`. Inside another forward pass it is part of that one.

        Args:
            key: the key; None: nothing is planned.
            watched: makes what watches it, if it is to be watched.

        Raises:
            UnreachableError: a budget in bytes cannot be had.
        """
        inside = _current.forward_pass is not None or enclosing_is_recorded() is not None
        if inside or key is None or not torch.is_grad_enabled():
            yield
            return
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _KindOfCall(self.budget)
            while len(self._kinds) > _KEPT:
                self._plans.pop(found := next(iter(self._kinds)), None)
                del self._kinds[found]
        step = None
        if current_task() == NO_TASK:
            # Not within a backward pass: a checkpoint around the net repeats a pass with the plan of that time.
            if kind.error is not None:
                raise UnreachableError(*kind.error.args)
            self._plans[key] = kind.plans
            if self._watched is not None:
                kind.idle = 0 if self._watched.finish() else kind.idle + 1
            # Calls without a backward pass, as in a validation with gradients, are seldom watched.
            is_watched = not kind.is_settled and (kind.idle < _IDLE or kind.idle % _IDLE == 0)
            kind.idle += not is_watched
            step = self._watched = watched() if is_watched else None
        this = _current.forward_pass = _ForwardPass(kind.measured, self._plans.get(key), step)
        try:
            with nullcontext() if step is None else step.forward_pass(kind.observe):
                yield
        finally:
            _current.forward_pass = None
        self._learn(key, kind, this)

    def is_settled(self, key: Hashable) -> bool:
        """True if forward passes with this key go by the last plan there will be, or there was nothing to plan."""
        kind = self._kinds.get(key)
        return kind is None or (kind.measured is not None and kind.is_settled)

    def _learn(self, key: Hashable, kind: _KindOfCall, done: _ForwardPass) -> None:
        if done.measured is None and any(share.costs for share in done.shares):
            kind.learn(done.measure())
        elif done.measured is None or (done.calls and not done.fits()):
            if done.step is not None:
                done.step.close()
            self._kinds.pop(key, None)  # its chains have changed, or there was nothing to measure: once more

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_kinds": {}, "_watched": None}


def call_key(arguments: Any, *, training: bool = True) -> Hashable:
    """Return what the shapes in a forward pass depend on; None if they are symbolic."""
    tensors = [leaf for leaf in tree_iter(arguments) if isinstance(leaf, Tensor)]
    if not all(type(size) is int for tensor in tensors for size in tensor.shape):
        return None
    shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
    devices = sorted({"cpu", *(tensor.device.type for tensor in tensors)})
    cast = tuple(autocast_state(device) for device in devices if torch.amp.is_autocast_available(device))
    return shapes, cast, training


@contextmanager
def share_of(call: Hashable, states: Callable[[], tuple[float, ...] | None]) -> Iterator[ChainShare | None]:
    """Yield the share of one call in the current forward pass; None outside of one, and in a recomputation.

    Args:
        call: what the call depends on: the chain and the shapes.
        states: gives those of a `ChainCost`.
    """
    if _current.forward_pass is None or RUNNING.again:
        yield None
        return
    with _current.forward_pass.share(call, states) as share:
        yield share


def is_planning() -> bool:
    """True in a forward pass whose chains share a plan."""
    return _current.forward_pass is not None
