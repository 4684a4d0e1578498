"""The arithmetic of a chain depends on the chain alone: where inputs are kept it is the plain recurrence."""

import copy

import pytest
import torch
from torch import nn

import mfx
from mfx.engine import ARITHMETICS, ChainPlan, ChainSettings, StepFunction, run_chain
from mfx.options.gamma import Gamma
from tests.mfx.engine.chains import WIDTH, error, gradients, make_root, make_steps, recurrence, run, weights_like
from tests.mfx.models import Stack, inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NINE = Gamma(9, 10)


def line(gamma, dtype):
    """The number of steps of the longest chain that keeps its inputs."""
    exact = ARITHMETICS["exact"]
    return max(steps for steps in range(1, 40) if not exact.walks_back(gamma, dtype, steps))


def run_and_grad(root, steps, x, **kw):
    x = x.clone().requires_grad_()
    out = run(root, steps, x, **kw).x
    return [out.detach(), *gradients((out.double() * weights_like(out.double())).sum(), root, x)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_line_is_where_inputs_take_as_much_as_the_reference(dtype):
    # X, V and the digits, eight bytes each; at γ = 9/10 no digit is spilled in so short a chain.
    assert line(NINE, dtype) == 24 // dtype.itemsize


@pytest.mark.parametrize("kind", ["residual", "map"])
@pytest.mark.parametrize("beyond", [0, 1], ids=["below the line", "above the line"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_plan_computes_the_same_bits(dtype, beyond, kind):
    depth = line(NINE, dtype) + beyond
    root = make_root(depth).to(dtype)
    steps = make_steps(root, kind)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = run_and_grad(root, steps, x, memory_budget=1.0)
    some = frozenset({0, depth - 1})
    for plan in (0.0, *(ChainPlan(k, from_inputs) for k in (frozenset(), some) for from_inputs in (False, True))):
        found = run_and_grad(root, steps, x, memory_budget=plan)
        assert all(map(torch.equal, found, kept)), plan


@pytest.mark.parametrize("kind", ["residual", "map"])
@pytest.mark.parametrize("gamma", [0.9, 0.5, 1 / 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_below_the_line_it_is_the_recurrence_to_rounding(dtype, gamma, kind):
    depth = line(Gamma.of(gamma), dtype)
    root = make_root(depth).to(dtype)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = run_and_grad(root, make_steps(root, kind), x, gamma=gamma)
    wide = copy.deepcopy(root).double()
    y = x.double().requires_grad_()
    out = recurrence(wide, make_steps(wide, kind), y, gamma=Gamma.of(gamma).value).x
    expected = [out.detach(), *gradients((out * weights_like(out)).sum(), wide, y)]
    # A few roundings a step, in numbers of the size of the largest.
    assert error(found, expected) <= 16 * depth * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["residual", "map"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_below_the_line_inference_computes_the_same_bits(dtype, kind):
    root = make_root(line(NINE, dtype)).to(dtype)
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, *_ = run_and_grad(root, make_steps(root, kind), x)
    with torch.no_grad():
        assert torch.equal(run(root, make_steps(root, kind), x).x, out)


def test_below_the_line_there_is_no_range():
    root = make_root(line(NINE, torch.float32))
    steps = make_steps(root, call=lambda f, x: 1e9 * torch.tanh(f(x)))
    out = run_and_grad(root, steps, torch.randn(4, WIDTH))
    assert all(t.isfinite().all() for t in out)
    assert out[0].abs().max() > 1e8


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("first, then", [(0.9, 1e-4), (1e-4, 0.9)])
def test_a_schedule_may_cross_the_line_while_a_call_is_under_way(first, then, budget):
    depth = line(Gamma.of(1e-4), torch.float32)
    assert ARITHMETICS["exact"].walks_back(NINE, torch.float32, depth)
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(depth)))
    results = []
    for changes in (False, True):
        net = mfx.momentumize(copy.deepcopy(model), gamma=first, memory_budget=budget, verify="raise")
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
        net(x).sum().backward()  # under a budget, the first call only measures
        net.zero_grad()
        y = net(x)
        if changes:
            mfx.set_gamma(net, then)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
        net(x).sum().backward()
    assert all(map(torch.equal, *results))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Nested(nn.Module):
    """A branch that is itself a chain, with one of the two on either side of the line."""

    def __init__(self, inner):
        super().__init__()
        self.inner = nn.Sequential(*(Residual() for _ in range(inner)))

    def forward(self, x):
        return x + torch.tanh(self.inner(torch.tanh(x)))


@pytest.mark.parametrize("outer, inner", [(3, 9), (9, 3), (3, 3), (9, 9)])
def test_nested_chains_decide_for_themselves(outer, inner):
    torch.manual_seed(0)
    model = nn.Sequential(*(Nested(inner) for _ in range(outer)))
    x = torch.randn(3, WIDTH)
    results = []
    for budget in (0.0, 0.5, 1.0):
        net = mfx.momentumize(copy.deepcopy(model), memory_budget=budget, verify="raise")
        for _ in range(2):
            net.zero_grad()
            y = net(x)
            y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters())])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_recomputation_that_differs_is_an_error_below_the_line_too():
    net = mfx.momentumize(Stack(3), verify="raise")
    net.blocks[1].norm2.register_forward_pre_hook(lambda m, args: (args[0] * (1 + 1e-3 * mfx.recomputing()),))
    with pytest.raises(mfx.MfxError, match="did not compute the values of the forward pass"):
        net(inputs()).sum().backward()


# --- several streams --------------------------------------------------------------------------------------------------


def two_streams(scale=1.0):
    """Nine updates of one stream, which by itself is walked back, and three of another, which is not."""
    root = make_root(9)

    def step(i):
        def branch(r, x, c):
            f = scale * torch.tanh(r.blocks[i](torch.cat([x, c])))
            return tuple(f.split([len(x), len(c)]))[: 2 if i < 3 else 1]

        writes = (0, 1) if i < 3 else (0,)
        kinds = ("residual",) * len(writes)
        return StepFunction(f"{i}", kinds, branch, branch, (), (f"blocks.{i}",), reads=(0, 1), writes=writes)

    return root, [step(i) for i in range(9)]


def rows(*counts):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, WIDTH, generator=generator).requires_grad_() for n in counts]


def run_streams(root, steps, xs, plan=None):
    return run_chain(
        "blocks", steps, xs, (), root, ChainSettings(NINE, ARITHMETICS["exact"], verify="raise", plan=plan)
    )


# At equal sizes the states of both, 24 + 24 bytes, take as much as 9 + 3 inputs of 4 bytes.
@pytest.mark.parametrize("counts, is_walked_back", [((5, 4), True), ((4, 4), False), ((4, 5), False)])
def test_streams_are_walked_back_if_that_takes_less_of_all_of_them(counts, is_walked_back):
    root, steps = two_streams(scale=1e7)
    if is_walked_back:
        with pytest.raises(mfx.MfxError, match="more than arithmetic='exact' can hold"):
            run_streams(root, steps, rows(*counts))
    else:
        assert all(x.isfinite().all() for x in run_streams(root, steps, rows(*counts)).xs)


@pytest.mark.parametrize("counts", [(5, 4), (4, 5)])
def test_every_plan_of_several_streams_computes_the_same_bits(counts):
    root, steps = two_streams()
    some, results = frozenset({0, 8}), []
    plans = [ChainPlan(k, from_inputs) for k in (frozenset(), some) for from_inputs in (False, True)]
    for plan in (ChainPlan.keep_all(9), None, *plans):
        xs = rows(*counts)
        out = run_streams(root, steps, xs, plan).xs
        loss = sum((x.double() * weights_like(x.double())).sum() for x in out)
        results.append([*(x.detach() for x in out), *gradients(loss, root, *xs)])
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(results[0], found, strict=True))
    wide, ys, v = copy.deepcopy(root).double(), [x.detach().double() for x in rows(*counts)], [0.0, 0.0]
    for step in steps:
        for stream, f in zip(step.writes, step.branch(wide, *ys), strict=True):
            v[stream] = 0.9 * v[stream] + 0.1 * f
        for stream in step.writes:
            ys[stream] = ys[stream] + v[stream]
    assert error(results[0][:2], ys) < 1e-5
