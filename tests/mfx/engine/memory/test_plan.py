"""The steps that a plan keeps; chains with some steps kept compute what chains with all or none kept compute."""

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mfx
from mfx.engine import StepFunction
from mfx.engine.memory.flops import _formulas
from mfx.engine.memory.plan import ChainCost, ChainPlan, StepCost, make_plan
from mfx_passes import MfxError
from tests.mfx.engine.chains import block, error, gradients, make_root, make_steps, run, weights_like

DEPTH = 7  # the shortest chain that is walked back
EVERY_PLAN = [
    *(ChainPlan(frozenset(kept), False) for kept in [(6,), (0, 1, 6), (1, 3, 6), (0, 2, 3), (0, 1, 2, 3, 4, 5)]),
    *(ChainPlan(frozenset(kept), True) for kept in [(0, 6), (1, 2, 4)]),
]
HOW = [
    {"gamma": 0.9},
    {"gamma": 1 / 64},
    {"gamma": 0.9, "arithmetic": "float"},
    {"gamma": 0.0},
    {"gamma": 0.9, "velocity": "residual"},
    {"gamma": 0.9, "velocity": "tensor"},
]


def step_gradients(plan, build=block, taps=(), kind="residual", **how):
    root = make_root(DEPTH, build)
    x = torch.randn(3, 4, 6, requires_grad=True)
    capture = torch.randn(3, 4, 6, requires_grad=True)
    if how.get("velocity") == "tensor":
        how = {**how, "velocity": torch.randn(3, 4, 6)}
    steps = make_steps(root, kind, lambda f, x, c: (f(x) + c.tanh() * x, x.size(0)), [0])
    torch.manual_seed(3)
    out = run(root, steps, x, [capture], memory_budget=plan, taps=taps, **how)
    loss = sum((weights_like(t) * t).sum() for t in (out.x, *out.taps))
    state = torch.get_rng_state()
    found = [out.x.detach(), *gradients(loss, root, x, capture), *root.buffers()]
    assert torch.equal(torch.get_rng_state(), state)
    return root.runs, [*found, state]


def noisy():
    return block(6, nn.Dropout(0.5), nn.BatchNorm1d(4))


@pytest.mark.parametrize("kind, taps", [("residual", ()), ("map", (2, 5))])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_gradients_are_those_of_keeping_all(how, taps, kind):
    torch.manual_seed(1)
    _, expected = step_gradients(1.0, noisy, taps, kind, **how)
    for plan in EVERY_PLAN:
        torch.manual_seed(1)
        runs, found = step_gradients(plan, noisy, taps, kind, **how)
        assert runs == [1 if i in plan.kept else 2 for i in range(DEPTH)]
        if how.get("arithmetic") != "float":
            assert all(map(torch.equal, found, expected)), plan
        else:
            # A rebuilt state is within 6e-6 (see FloatState); gradients may be off by ten times that.
            assert error(found[:-1], expected[:-1]) < 6e-5


def test_float_anchors_count_from_the_first_step_that_runs_again():
    def run_with(plan):
        root = make_root(40)
        x = torch.randn(2, 6, requires_grad=True)
        out = run(root, make_steps(root), x, memory_budget=plan, gamma=0.9, arithmetic="float").x
        return gradients((weights_like(out) * out).sum(), root, x)

    expected = run_with(1.0)
    for kept in (range(7), range(20, 40), range(3, 33, 4)):
        assert error(run_with(ChainPlan(frozenset(kept), False)), expected) < 6e-5


@pytest.mark.parametrize("kept", [(0, 1), (0, 1, 3), (6,), (3,)])
def test_the_second_run_is_verified_where_the_walk_ends(kept):
    root = make_root(DEPTH)
    unsteady = iter(range(100))

    def call(f, x):
        return f(x) + (next(unsteady) if f is root.blocks[2] else 0)

    out = run(root, make_steps(root, call=call), torch.randn(2, 6), memory_budget=ChainPlan(frozenset(kept), False))
    with pytest.raises(MfxError, match="did not lead back to where"):
        out.x.sum().backward()


def test_retained_graphs_and_second_derivatives():
    results = []
    for plan in (1.0, ChainPlan(frozenset({0, 2, 5}), False), ChainPlan(frozenset({1, 2}), True)):
        root = make_root(DEPTH)
        x = torch.randn(2, 6, requires_grad=True)
        out = run(root, make_steps(root), x, memory_budget=plan).x
        loss = (weights_like(out) * out).sum()
        twice = [gradients(loss, root, x, retain_graph=True) for _ in range(2)]
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append([*twice[0], *twice[1], *gradients(slope.square().sum(), root, x)])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_chain_in_a_step_keeps_what_the_step_keeps():
    root = make_root(3)
    root.inner = nn.ModuleList([make_root(2) for _ in range(3)])

    def step(i):
        def branch(r, x):
            return (run(r.inner[i], make_steps(r.inner[i]), r.blocks[i](x), memory_budget=0.5).x,)

        return StepFunction(f"{i}", ("residual",), branch, branch, (), (f"blocks.{i}", f"inner.{i}"))

    def gradients_with(plan):
        x = torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()
        for inner in root.inner:
            inner.runs = [0, 0]
        out = run(root, [step(i) for i in range(3)], x, memory_budget=plan).x
        found = gradients((weights_like(out) * out).sum(), root, x)
        return found, [inner.runs for inner in root.inner]

    expected, runs = gradients_with(1.0)
    assert runs == [[1, 1]] * 3
    found, runs = gradients_with(ChainPlan(frozenset({1}), False))
    assert all(map(torch.equal, found, expected))
    # Once forward and once to rebuild; what the outer recomputation itself counts is put back with the module's lists.
    assert runs == [[2, 2], [1, 1], [2, 2]]


def test_the_values_of_kept_steps_die_with_the_graph():
    root = make_root(DEPTH)
    values = []

    def call(f, x):
        y = f(x)
        values.append(weakref.ref(y.untyped_storage()))
        return y

    plan = ChainPlan(frozenset({2, 3}), False)
    out = run(root, make_steps(root, call=call), torch.randn(2, 6), memory_budget=plan).x
    assert values[2]() is not None
    gc.disable()
    try:
        out.sum().backward()
        assert values[2]() is None  # before the graph goes
        out = run(root, make_steps(root, call=call), torch.randn(2, 6), memory_budget=plan).x
        del out
        assert all(value() is None for value in values)
    finally:
        gc.enable()


WIDE = 32
LAYOUTS = {
    "plain": lambda: block(WIDE),
    "value saved": lambda: nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU()),
    "input not saved": lambda: nn.Sequential(nn.ReLU(), nn.Linear(WIDE, WIDE)),
}


def costs_of(root, x, **how):
    costs = []
    run(root, make_steps(root), x, costs=costs, **how)
    return costs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_costs_are_what_autograd_keeps(layout, gamma):
    """The bytes kept with all steps kept, as the meter counts them, are the sum of the costs."""
    root = make_root(DEPTH, LAYOUTS[layout])
    x = torch.randn(8, WIDE)
    costs = costs_of(root, x, gamma=gamma)
    with mfx.ActivationMeter(exclude=[x, *root.parameters()]) as meter:
        out = run(root, make_steps(root), x, gamma=gamma, memory_budget=1.0).x
        kept = meter.live - out.untyped_storage().nbytes()
    unit = out.untyped_storage().nbytes()
    if gamma:
        # Exact arithmetic gives the first step a rounded copy of x.
        assert kept == sum(cost.saved + cost.reads for cost in costs)
    else:
        in_between = unit if layout != "input not saved" else 0
        assert kept == sum(cost.saved for cost in costs) + in_between * (len(costs) - 1)
    linear = [m for m in root.blocks[0].modules() if isinstance(m, nn.Linear)]
    if not gamma and layout != "value saved":
        linear.pop()  # nothing is saved after it, and its value is not needed
    assert {cost.flops for cost in costs} == {sum(2 * 8 * m.in_features * m.out_features for m in linear)}
    assert {cost.input for cost in costs} == {unit}


def test_every_kernel_of_attention_counts():
    names = torch._C._dispatch_get_all_op_names()
    kernels = {name for name in names if name.startswith("aten::_scaled_dot_product_") and "." not in name}
    kernels.discard("aten::_scaled_dot_product_attention_math")  # of other operations
    q = torch.empty(2, 3, 5, 8, device="meta")
    for name in kernels:
        formula = _formulas()[getattr(torch.ops.aten, name.removeprefix("aten::"))]
        if not name.endswith("_backward"):
            assert formula(q, q, q, out_val=(q,)) == 2 * 2 * (2 * 3 * 5 * 5 * 8)


def test_attention_counts_on_a_cpu():
    """The kernels of attention on a CPU, which have no formulas in torch, count as those of other devices."""
    costs, x = [], torch.randn(2, 3, 5, 8, requires_grad=True)
    root = make_root(3)
    attend = make_steps(root, call=lambda f, x: nn.functional.scaled_dot_product_attention(x, x, x).tanh())
    run(root, attend, x, costs=costs)
    assert [step.flops for step in costs] == [2 * 2 * (2 * 3) * 5 * 5 * 8] * 3  # q·kᵀ and its product with v


@st.composite
def chain_costs(draw):
    small = st.integers(0, 40)
    step = st.builds(StepCost, small, small, st.integers(1, 40), small, small)
    steps = tuple(draw(st.lists(step, max_size=7)))
    growth = draw(st.none() | st.lists(st.integers(0, 60), min_size=len(steps), max_size=len(steps)))
    states = None if growth is None else tuple(float(sum(growth[:t])) for t in range(len(steps) + 1))
    return ChainCost(steps, states)


def bytes_of(cost, plan):
    """Return the bytes that a plan keeps, from the definitions."""
    again = [i for i in range(len(cost.steps)) if i not in plan.kept]
    kept = sum(cost.steps[i].saved for i in plan.kept)
    if cost.states is None:
        return kept + sum(step.input for step in cost.steps)
    kept += sum(cost.steps[i].reads for i in plan.kept)
    if not again:
        return kept
    if plan.from_inputs:
        return kept + sum(cost.steps[i].input for i in again)
    passed = [i for i in plan.kept if again[0] < i < again[-1]]
    return kept + cost.states[again[-1] + 1] + sum(cost.steps[i].value for i in passed)


def within(costs, limit):
    """Return the plan that keeps at most so many bytes."""
    extremes = make_plan(costs, 0.0)
    room = extremes.maximum - extremes.minimum
    return make_plan(costs, min(1.0, max(0.0, (limit - extremes.minimum) / room)) if room > 0 else 0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(chain_costs(), min_size=1, max_size=4))
def test_plans_grow_with_the_budget_and_keep_within_it(costs):
    plans = [make_plan(costs, b / 10) for b in range(11)]
    for plan, after in itertools.pairwise(plans):
        assert plan.kept <= after.kept
        assert all(a.kept <= b.kept for a, b in zip(plan.chains, after.chains, strict=True))
    for b, plan in enumerate(plans):
        found = sum(bytes_of(*both) for both in zip(costs, plan.chains, strict=True))
        assert found == pytest.approx(plan.kept)
        assert found <= plan.minimum + b / 10 * max(0, plan.maximum - plan.minimum) + 1e-6
    assert [len(chain.kept) for chain in plans[-1].chains] == [len(cost.steps) for cost in costs]
    limit = plans[0].minimum + 30
    assert within(costs, limit).kept <= limit
    assert within(costs, 1.0).kept <= plans[0].minimum + 1e-6 or plans[0].minimum < 1


def test_of_equal_steps_the_last_are_kept():
    costs = [ChainCost((StepCost(10, 1, 5, 1, 5),) * 4, (0.0,) + (6.0,) * 4)] * 2
    plan = within(costs, 12.0 + 33)
    assert [sorted(chain.kept) for chain in plan.chains] == [[], [1, 2, 3]]
    assert plan.kept == 6 + 33 + 5  # one step is left: its input is less than a state
    assert [chain.from_inputs for chain in plan.chains] == [False, True]


def test_steps_that_give_more_flops_per_byte_come_first():
    small, large = StepCost(10, 0, 10, 1, 100), StepCost(40, 0, 10, 1, 100)
    cost = ChainCost((large, small, large, small, large), (0.0,) + (3.0,) * 5)
    kept = [sorted(within([cost], limit).chains[0].kept) for limit in (3, 13, 14, 24, 25)]
    assert kept == [[], [], [3], [3], [1, 3]]


def test_half_of_a_long_chain():
    costs = [ChainCost((StepCost(10, 1, 5, 1, 5),) * 2000, (0.0,) + (6.0,) * 2000)]
    (chain,) = make_plan(costs, 0.5).chains
    assert chain.kept == frozenset(range(1001, 2000))  # 999 · 11 + 6 ≤ 6 + (22000 − 6) / 2 < 1000 · 11 + 6
