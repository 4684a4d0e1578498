"""The search for a plan below a peak: on a machine of steps whose bytes are known at every moment."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from mfx.engine import ChainCost, Phase, StepCost
from mfx.engine.memory.peak import Lap, PeakSearch, top_of

small = st.integers(0, 30)


@dataclass(frozen=True)
class Machine:
    """One chain that keeps its inputs; a step's branch has temporaries, and its backward pass has more."""

    costs: tuple[StepCost, ...]
    temporary: tuple[int, ...]
    backward: tuple[int, ...]

    def laps(self, kept):
        """Return what a training step takes that keeps the activations of these steps, moment by moment."""
        level, laps = 0, []
        for i, cost in enumerate(self.costs):
            start, level = level, level + cost.input + (cost.saved if i in kept else 0)
            held = cost.saved if i in kept else 0
            laps.append(Lap(0, i, Phase.RUN, start, max(level, start + cost.input + held + self.temporary[i])))
            laps.append(Lap(0, i, Phase.DONE, level, level))
        for i, cost in reversed(list(enumerate(self.costs))):
            there = level + (0 if i in kept else cost.saved)
            laps.append(Lap(0, i, Phase.GRADIENT, level, there + self.backward[i]))
            level = there - cost.saved - cost.input
        assert level == 0
        return laps

    def peak(self, kept):
        return top_of(self.laps(kept))


@st.composite
def machines(draw):
    steps = draw(st.integers(1, 6))
    temporary = tuple(draw(st.lists(small, min_size=steps, max_size=steps)))
    backward = tuple(draw(st.lists(small, min_size=steps, max_size=steps)))
    saved = [(draw(small), draw(st.integers(1, 10)), draw(st.integers(1, 50))) for _ in range(steps)]
    knows_rise = draw(st.booleans())
    costs = tuple(
        StepCost(s, 0, i, 0, flops, s + i + t if knows_rise else None)
        for (s, i, flops), t in zip(saved, temporary, strict=True)
    )
    return Machine(costs, temporary, backward)


@settings(max_examples=200, deadline=None)
@given(machines(), st.integers(0, 300))
def test_no_measured_step_is_above_the_limit_and_nothing_more_fits(machine, limit):
    search = PeakSearch([ChainCost(machine.costs, None)], limit)
    least = machine.peak(())
    kept, steps = frozenset(), 0
    while not search.settled:
        (plan,) = search.plans
        assert kept <= plan.kept
        kept, steps = plan.kept, steps + 1
        assert machine.peak(kept) <= max(least, limit)
        search.observe(machine.laps(kept))
    assert steps <= 6
    assert search.plans[0].kept == kept
    if least <= limit and machine.costs[0].rise is not None:
        left = set(range(len(machine.costs))) - kept
        assert all(machine.peak(kept | {step}) > limit for step in left)


def test_a_bound_that_was_too_low_is_taken_back():
    machine = Machine((StepCost(10, 0, 1, 0, 5, 11),) * 3, (0,) * 3, (0,) * 3)
    search = PeakSearch([ChainCost(machine.costs, None)], 30)
    search.observe(machine.laps(()))
    assert search.plans[0].kept
    search.observe([Lap(0, 0, Phase.RUN, 0, 31)])
    assert search.settled
    assert not search.plans[0].kept
