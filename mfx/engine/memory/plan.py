"""Plans which steps keep their activations under a budget of bytes: a pure function of the steps' costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCost:
    """The measured cost of one step.

    Attributes:
        saved: bytes that autograd saves in it, beside its input, parameters, buffers and captures.
        reads: bytes of its input if autograd saves that, else 0.
        input: bytes of its input.
        value: bytes of its branch's value if autograd does not save that, else 0.
        flops: of a recomputation, by torch's formulas.
        rise: the most bytes that its forward run has alive beside those before it, if all that autograd saves stays
            alive; None: not measured.
    """

    saved: int
    reads: int
    input: int
    value: int
    flops: int
    rise: int | None = None


@dataclass(frozen=True)
class ChainCost:
    """The cost of one chain.

    Attributes:
        steps: the costs of its steps.
        states: bytes kept to walk back over the steps before the t-th, for t = 0 … T; None where inputs are kept in any
            case (γ = 0, and what lies between the chains).
        held: see `ChainPlan`; what such a step saves outside of its chains is kept in every plan.
        whole: see `ChainPlan`; such a step saves what its chains save, too.
    """

    steps: tuple[StepCost, ...]
    states: tuple[float, ...] | None
    held: frozenset[int] = frozenset()
    whole: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ChainPlan:
    """The plan of one call of a chain: which steps keep their activations, and how the others are recomputed.

    A step that holds chains is recomputed with them, which then rebuild their activations once more, unless it is in
    ``held`` or ``whole``.

    Attributes:
        kept: numbers of the steps that keep their activations.
        from_inputs: the others keep their inputs. If False, states are walked back from the last of them to the first;
            a kept step in between keeps its branch's value, which the walk needs to pass it.
        held: numbers of the steps that keep what autograd saves outside of the chains in them, which rebuild theirs by
            themselves.
        whole: numbers of the steps whose recomputation keeps all activations until their gradients are there.
    """

    kept: frozenset[int]
    from_inputs: bool
    held: frozenset[int] = frozenset()
    whole: frozenset[int] = frozenset()

    @classmethod
    def keep_all(cls, steps: int) -> ChainPlan:
        """Return the plan by which all of so many steps keep their activations."""
        return cls(frozenset(range(steps)), from_inputs=False)

    def walked(self, steps: int) -> range:
        """Return the numbers of the steps from the first to the last recomputed one."""
        if not self.kept and not self.held:
            return range(steps)
        recomputed = [step for step in range(steps) if step not in self.kept and step not in self.held]
        return range(recomputed[0], recomputed[-1] + 1) if recomputed else range(0)


@dataclass(frozen=True)
class NetPlan:
    """The plan of all chains of a net, and what it keeps.

    Attributes:
        chains: in the order of their costs.
        kept: bytes kept between forward and backward.
        minimum: bytes kept if all steps are recomputed.
        maximum: bytes that ordinary backpropagation keeps.
    """

    chains: tuple[ChainPlan, ...]
    kept: float
    minimum: float
    maximum: float


def make_plan(costs: Sequence[ChainCost], fraction: float) -> NetPlan:
    """Return the plan that keeps the steps with the most FLOPs per byte, as many as a share of the memory allows.

    Steps are taken one by one, always the one that at that moment saves the most FLOPs per additional byte. The order
    does not depend on the budget, so a larger budget keeps all that a smaller one keeps. A kept step adds what autograd
    saves in it, and the value of its branch if the walk back has to pass it. Of equal steps the last ones are therefore
    kept first: the walk starts before them, and their activations are freed before the first step is recomputed.

    Args:
        costs: of all chains of a net.
        fraction: b between 0 and 1: keep at most m₀ + b·(m₁ − m₀) bytes, where m₀ is the minimum and m₁ the maximum.
    """
    fillings = [_Filling(cost) for cost in costs]
    maximum = sum(filling.all_kept() for filling in fillings)
    total = minimum = sum(filling.bytes() for filling in fillings)
    order: list[int] = []  # numbers of fillings: each entry keeps the next step of that filling's own order
    totals = [total]
    for number, change in _one_by_one(fillings):
        order.append(number)
        totals.append(totals[-1] + change)
    limit = minimum + fraction * max(0.0, maximum - minimum)
    slack = 1e-9 * max(map(abs, (limit, maximum, minimum)))  # rounding of the sums
    count = max((n for n, total in enumerate(totals) if total <= limit + slack), default=0)
    taken = [order[:count].count(number) for number in range(len(fillings))]
    plans = tuple(filling.plan_after(n) for filling, n in zip(fillings, taken, strict=True))
    return NetPlan(plans, totals[count], minimum, maximum)


def _one_by_one(fillings: Sequence[_Filling]) -> Iterator[tuple[int, float]]:
    """Yield the filling that keeps one more step and the change in bytes, until all steps are kept."""
    best = [filling.best() for filling in fillings]
    while any(choice is not None for choice in best):
        # Of equals the later chain: what is kept last is freed first.
        _, number, step = max((choice[0], n, choice[1]) for n, choice in enumerate(best) if choice is not None)
        yield number, fillings[number].keep(step)
        best[number] = fillings[number].best()


@dataclass(frozen=True)
class _Sums:
    """Bytes of a chain with some of its steps kept; a walk back passes the steps from ``first`` to ``end``."""

    first: int
    end: int
    saved: int = 0
    values: int = 0
    inputs: int = 0


class _Filling:
    """A chain while its steps are kept one after the other."""

    def __init__(self, cost: ChainCost) -> None:
        self._cost = cost
        self._steps = steps = cost.steps
        self._kept: set[int] = set()
        self._history: list[tuple[int, bool]] = []
        self._all_inputs = sum(step.input for step in steps)
        self._sums = _Sums(0, len(steps), inputs=self._all_inputs)
        for i in sorted(cost.held):
            self._sums = self._with(i)
            self._kept.add(i)
        self._start = self._sums
        free = (i for i in range(len(steps)) if i not in cost.held)
        self._sorted = sorted(free, key=lambda i: (_ratio(steps[i].flops, self._alone(steps[i])), i))

    def bytes(self) -> float:
        """Return the bytes kept now."""
        return self._bytes(self._sums)

    def all_kept(self) -> float:
        """Return the bytes kept by ordinary backpropagation."""
        always = self._cost.states is None
        return sum(step.saved + (step.input if always else step.reads) for step in self._steps)

    def best(self) -> tuple[float, int] | None:
        """Return the FLOPs saved per byte and the step to keep next; None if all are kept."""
        while self._sorted and self._sorted[-1] in self._kept:
            self._sorted.pop()
        if not self._sorted:
            return None
        now, found = self.bytes(), None
        for i in dict.fromkeys((self._sums.end - 1, self._sums.first, self._sorted[-1])):
            ratio = _ratio(self._steps[i].flops, self._bytes(self._with(i)) - now)
            if found is None or ratio > found[0]:
                found = ratio, i
        return found

    def keep(self, i: int) -> float:
        """Keep a step; return the change in bytes."""
        before, self._sums = self.bytes(), self._with(i)
        self._kept.add(i)
        self._history.append((i, self._keeps_inputs(self._sums)))
        return self.bytes() - before

    def plan_after(self, count: int) -> ChainPlan:
        """Return the chain's plan with only the first ``count`` of the kept steps."""
        kept = frozenset(i for i, _ in self._history[:count])
        from_inputs = self._history[count - 1][1] if count else self._keeps_inputs(self._start)
        return ChainPlan(kept, from_inputs, self._cost.held, self._cost.whole)

    def _alone(self, step: StepCost) -> int:
        return step.saved + (0 if self._cost.states is None else step.reads + step.value)

    def _with(self, i: int) -> _Sums:
        """Return the sums with one more step kept."""
        step, sums, kept = self._steps[i], self._sums, self._kept
        first, end, values = sums.first, sums.end, sums.values + step.value
        while first < end and (first == i or first in kept):
            values -= self._steps[first].value
            first += 1
        while end > first and (end - 1 == i or end - 1 in kept):
            end -= 1
            values -= self._steps[end].value
        reads = 0 if self._cost.states is None else step.reads
        return _Sums(first, end, sums.saved + step.saved + reads, values, sums.inputs - step.input)

    def _bytes(self, sums: _Sums) -> float:
        return sums.saved + min(self._inputs(sums), self._states(sums))

    def _keeps_inputs(self, sums: _Sums) -> bool:
        return self._inputs(sums) <= self._states(sums)

    def _inputs(self, sums: _Sums) -> float:
        return self._all_inputs if self._cost.states is None else sums.inputs

    def _states(self, sums: _Sums) -> float:
        if self._cost.states is None:
            return math.inf
        return self._cost.states[sums.end] + sums.values if sums.first < sums.end else 0.0


def _ratio(flops: int, size: float) -> float:
    return math.inf if size <= 0 else flops / size
