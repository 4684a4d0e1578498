"""Searches the plan that keeps the most under a bound on the peak: a pure function of what measured steps took.

A training step is a sequence of laps: the run of the branch of a step, and what follows until the next one runs; and
then from the gradient of one to that of the one before. What a step keeps that was recomputed when the laps were
measured is there from its own forward run on, until its gradient comes; in the lap after that its recomputation has
held as much. So the tops of the laps, raised by what is kept over them, are an upper bound of the peak; measured again,
they are what further steps are added to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from mfx.engine.memory.plan import ChainCost, ChainPlan, StepCost
from mfx.engine.steps import Phase

_ROUNDS = 4  # measured plans; each adds what the one before leaves room for


@dataclass(frozen=True)
class Lap:
    """The time between two marks of a training step.

    Attributes:
        chain: number of the chain that the mark at its start is of, in the order of the calls; -1: of none.
        step: number of the step.
        phase: of the step.
        start: the bytes alive at the mark.
        top: the most bytes alive at once.
        guessed: those of them that were not seen.
    """

    chain: int
    step: int
    phase: Phase
    start: int
    top: int
    guessed: int = 0


class PeakSearch:
    """The search for one kind of call.

    Args:
        costs: of the chains, in the order of their calls, as `choose_nesting` returns them.
        limit: bytes.

    Attributes:
        plans: of the chains: to be run next, and measured as long as the search is not ``settled``.
    """

    def __init__(self, costs: Sequence[ChainCost], limit: float) -> None:
        self._costs, self._limit = costs, limit
        self._kept: list[frozenset[int]] = [frozenset() for _ in costs]
        self._measured = list(self._kept)
        self._rounds = 0
        self.settled = False
        self.plans = self._plans()

    @property
    def is_new(self) -> bool:
        """True if no step has been measured."""
        return self._rounds == 0

    def observe(self, laps: Sequence[Lap]) -> None:
        """Take in the laps of a step that was run by ``plans``, and add to these what is sure to fit."""
        self._rounds += 1
        if top_of(laps) > self._limit:  # by what costs do not tell: back to what was measured
            self._kept, self.settled = self._measured, True
        else:
            self._measured = list(self._kept)
            if self._rounds <= _ROUNDS:
                self._kept = _Filled(self._costs, self._kept, laps, self._limit).kept
            self.settled = self._kept == self._measured
        self.plans = self._plans()

    def _plans(self) -> tuple[ChainPlan, ...]:
        return tuple(
            ChainPlan(kept, not _walks(cost), cost.held, cost.whole)
            for kept, cost in zip(self._kept, self._costs, strict=True)
        )


def top_of(laps: Sequence[Lap], *, seen: bool = False) -> int:
    """Return the peak of a step; of what was ``seen``, if that is asked for."""
    return max((lap.top - (lap.guessed if seen else 0) for lap in laps), default=0)


def _walks(cost: ChainCost) -> bool:
    """True if a chain is walked back; else its inputs are kept."""
    return cost.states is not None and cost.states[-1] < float("inf")


@dataclass
class _Filled:
    """A step to which more and more is kept, as long as it stays below the limit.

    Of a chain that is walked back the last steps are kept first: the walk starts before them.
    """

    costs: Sequence[ChainCost]
    kept: list[frozenset[int]]
    laps: Sequence[Lap]
    limit: float
    _places: Mapping[tuple[int, int, Phase], int] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = list(self.kept)
        self._tops = [lap.top for lap in self.laps]
        self._starts = [lap.start for lap in self.laps]
        self._places = {(lap.chain, lap.step, lap.phase): i for i, lap in enumerate(self.laps)}
        closed: set[tuple[int, int]] = set()
        while found := [choice for number in range(len(self.costs)) for choice in self._choices(number, closed)]:
            # Of equals the last: what is kept last is freed first.
            for _, number, step in sorted(found, reverse=True):
                if not self._keep(number, step):
                    closed.add((number, step))

    def _choices(self, number: int, closed: set[tuple[int, int]]) -> list[tuple[float, int, int]]:
        """Return the steps of a chain that may be kept next, after the FLOPs that a byte saves."""
        cost = self.costs[number]
        free = [i for i in range(len(cost.steps)) if i not in self.kept[number] and i not in cost.held]
        if _walks(cost) and free and (number, free[-1]) not in closed:
            free = free[-1:]
        choices = [(number, i) for i in free if (number, i) not in closed and (number, i, Phase.DONE) in self._places]
        return [(_per_byte(cost.steps[i]), number, i) for number, i in choices]

    def _keep(self, number: int, step: int) -> bool:
        """Keep a step if that fits; return whether it did."""
        cost, before = self.costs[number], {*self.kept[number], *self.costs[number].held}
        steps, kept, here = len(cost.steps), {*before, step}, cost.steps[step]
        raised: dict[int, int] = {}

        def add(size: float, first: int, end: int) -> None:
            for lap in range(first, end):
                raised[lap] = raised.get(lap, self._tops[lap]) + round(size)

        run, first = self._lap_of(number, step, Phase.RUN), self._lap_of(number, step, Phase.DONE)
        until = self._lap_of(number, step, Phase.GRADIENT)
        if cost.states is None:
            add(here.saved, first, until)
        elif not _walks(cost):
            add(max(0, here.saved + here.reads - here.input), first, until)
        else:
            start, end = (_start_of_last(steps, found) for found in (kept, before))
            passed = start > step and not kept.issuperset(range(step))  # the walk passes it by its value
            add(here.saved + here.reads + (here.value if passed else 0), first, until)
            # The state that the walk starts from is one more while the chain goes on from it.
            gone = self._lap_of(number, min(end, steps - 1), Phase.DONE) + (end == steps)
            add(cost.states[start], self._lap_of(number, start, Phase.DONE), gone)
        more = raised.get(run, self._tops[run]) - self._tops[run]
        rise = self._tops[run] - self._starts[run] + here.saved if here.rise is None else here.rise
        raised[run] = max(raised.get(run, 0), self._starts[run] + more + rise)
        if any(top > self.limit for top in raised.values()):
            return False
        for lap, top in raised.items():
            self._starts[lap] += top - self._tops[lap] if lap != run else 0
            self._tops[lap] = top
        self.kept[number] = frozenset(kept - cost.held)
        return True

    def _lap_of(self, number: int, step: int, phase: Phase) -> int:
        """Return the number of a lap; one more than the last one's, where the step has none."""
        return self._places.get((number, step, phase), len(self._tops))


def _start_of_last(steps: int, kept: Set[int]) -> int:
    """Return the number of the first of the last steps that are kept; of all steps, if the last one is not."""
    first = steps
    while first - 1 in kept:
        first -= 1
    return first


def _per_byte(step: StepCost) -> float:
    size = step.saved + step.reads
    return step.flops / size if size > 0 else float("inf")
