"""The way in which steps that hold chains run again: held or whole."""

from mfx.engine import ChainCost, ChainPlan, StepCost
from mfx.engine.memory.nesting import choose_nesting


def chain(saved, flops, count=2, states=None):
    return ChainCost((StepCost(saved, 0, 4, 0, flops),) * count, states)


def test_without_chains_in_chains_nothing_changes():
    costs = [chain(10, 5), chain(20, 5, states=(0.0, 6.0, 6.0))]
    assert choose_nesting(costs, [None, None]) == costs


def test_at_gamma_0_steps_are_held_with_enough_work_inside():
    inner = chain(10, 40)
    for outside, held in ((20, True), (170, True), (300, False)):
        outer = ChainCost((StepCost(7, 0, 4, 0, 80 + outside), StepCost(9, 0, 4, 0, 30)), None)
        found = choose_nesting([outer, inner], [None, (0, 0)])
        if held:
            assert found == [ChainCost(outer.steps, None, held=frozenset({0})), inner]
        else:
            assert found[0].whole == {0}
            assert [step.saved for step in found[0].steps] == [7 + 2 * 10, 9]
            assert found[1].steps == ()


def test_a_chain_that_is_walked_back_takes_the_way_with_fewer_bytes():
    inner = chain(10, 40)
    for steps, held in ((1, True), (40, False)):
        states = (0.0, *[24.0] * steps)
        outer = ChainCost((StepCost(3, 1, 4, 0, 90),) * steps, states)
        around = [None, *((0, i) for i in range(steps))]
        found = choose_nesting([outer, *[inner] * steps], around)
        assert bool(found[0].held) is held
        # Held, each step keeps 3 + 1 outside and two inputs inside; whole, inputs or states are kept, and 24 at once.
        assert held == (steps * (4 + 8) + 10 < min(4 * steps, 24) + (4 + 20))


def test_a_third_level_inside_of_a_whole_step_costs_nothing_of_its_own():
    outer = ChainCost((StepCost(100, 0, 4, 0, 1000),), None)
    costs = [outer, chain(10, 40, 1), chain(5, 20, 1)]
    found = choose_nesting(costs, [None, (0, 0), (1, 0)])
    assert found[0].whole
    assert [cost.steps for cost in found[1:]] == [(), ()]
    assert found[0].steps[0].saved == 100 + 10 + 5


def test_what_is_held_is_not_passed_by_a_walk():
    assert ChainPlan(frozenset(), False, held=frozenset({0, 2, 3})).walked(4) == range(1, 2)
