"""memory_budget: what a net keeps, by the meter; that it computes the same; and what it says."""

import copy
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mfx
from mfx.options.memory_budget import MemoryBudget

WIDTH = 16
STEP = 6 * 5 * WIDTH * 4 * 12  # bytes: no step saves more than twelve times its input
TENTHS = [tenth / 10 for tenth in range(11)]


class Branch(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.inside = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, factor * WIDTH), nn.GELU(), nn.Linear(factor * WIDTH, WIDTH)
        )
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(self.inside(x))


class Net(nn.Module):
    """Two chains: one of steps that are not alike, and one behind a projection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.first = nn.ModuleList(Branch(1 + 3 * (i % 2)) for i in range(6))
        self.between = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(5), nn.ReLU())
        self.second = nn.ModuleList(Branch(2) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.first:
            x = x + branch(x)
        x = self.between(x)
        for branch in self.second:
            x = x + branch(x)
        return self.head(x)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net()


def step(net, x):
    """One training step from one random state; what it leaves behind."""
    torch.manual_seed(1)
    net.zero_grad()
    out = net(x)
    out.square().sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    return [out.detach(), *grads, *(b.clone() for b in net.buffers()), torch.get_rng_state()]


def measured(net, x):
    """Bytes between forward and backward, the peak, and FLOPs, once the net knows its steps."""
    step(net, x)
    with FlopCounterMode(display=False) as flops:
        step(net, x)
    return *memory(net, x), flops.get_total_flops()


def memory(net, x):
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.grad = None
    with mfx.ActivationMeter(exclude=[x, *parameters]) as meter:
        out = net(x)
        kept = meter.live
        out.square().sum().backward()
        del out
    return kept, meter.peak


def copied(model, **options):
    return mfx.momentumize(copy.deepcopy(model), **options)


def never_fall(values, slack=0):
    return all(b >= a - slack for a, b in pairwise(values))


@pytest.mark.parametrize("gamma, budgets", [(0.9, TENTHS), (0.0, TENTHS[::5])])
def test_a_smaller_budget_keeps_less_and_works_more(model, gamma, budgets):
    x = torch.randn(6, 5, 8)
    found = [measured(copied(model, memory_budget=b, gamma=gamma), x) for b in budgets]
    kept, peaks, flops = zip(*found, strict=True)
    checksums = 9 * 8  # a step that runs again from its input keeps eight bytes to be verified by
    assert never_fall(kept, checksums)
    assert never_fall(peaks, checksums)
    assert never_fall([-count for count in flops])
    assert len(set(kept)) > len(budgets) // 2
    limits = [kept[0] + b * (kept[-1] - kept[0]) for b in budgets]
    assert all(k <= limit + checksums for k, limit in zip(kept, limits, strict=True))
    assert flops[-1] == measured(copy.deepcopy(model), x)[2]
    assert not never_fall([2, 1])
    assert never_fall([2, 1], 1)


@pytest.mark.parametrize("how", [{}, {"gamma": 0.0}, {"velocity": "residual"}], ids=str)
def test_every_budget_gives_the_gradients_of_keeping_all(model, how):
    x = torch.randn(6, 5, 8)
    kept = copied(model, memory_budget=1.0, **how)
    expected = [step(kept, x) for _ in range(3)]
    for budget in (0.25, "80 KB"):
        net = copied(model, memory_budget=budget, verify="raise", **how)
        for left in expected:  # without a plan, and with one
            assert all(map(torch.equal, step(net, x), left)), budget


def test_a_number_of_bytes_bounds_the_peak_of_the_whole_net(model):
    x = torch.randn(6, 5, 8)
    least, most = (measured(copied(model, memory_budget=b), x)[1] for b in (0.0, 1.0))
    budget = (least + most) // 2
    net = copied(model, memory_budget=budget)
    peaks = [memory(net, x)[1] for _ in range(8)]
    assert max(peaks[2:]) <= budget
    assert budget - STEP < peaks[-1]


def test_a_budget_below_the_minimum_is_an_error_from_the_third_step_on(model):
    net = copied(model, memory_budget="1 B")
    for rows in (6, 7):
        x = torch.randn(rows, 5, 8)
        step(net, x)
        step(net, x)
        for _ in range(2):
            with pytest.raises(mfx.MfxError, match=r"memory_budget=1 bytes: .* less than \d+ bytes .* smaller batch"):
                step(net, x)


def test_each_shape_has_its_plan(model):
    net = copied(model, memory_budget=0.5)
    small, large = torch.randn(2, 5, 8), torch.randn(6, 5, 8)
    expected = {id(x): measured(copied(model, memory_budget=0.5), x) for x in (small, large)}
    for x in (small, large, small):
        assert measured(net, x) == expected[id(x)]


def test_another_gamma_is_planned_anew(model):
    x = torch.randn(6, 5, 8)
    net = copied(model, memory_budget=0.4)
    step(net, x)
    step(net, x)
    mfx.set_gamma(net, 0.0)
    step(net, x)  # finds the plan outdated
    assert measured(net, x) == measured(copied(model, memory_budget=0.4, gamma=0.0), x)


def test_inference_and_frozen_nets_make_no_plan(model):
    x = torch.randn(6, 5, 8)
    net = copied(model, memory_budget=0.5)
    with torch.no_grad():
        net(x)
    net.requires_grad_(False)
    assert not net(x).requires_grad
    net.requires_grad_(True)
    assert measured(net, x) == measured(copied(model, memory_budget=0.5), x)


def test_in_a_checkpoint_and_in_copies(model):
    x = torch.randn(6, 5, 8)
    net = copied(model, memory_budget=0.5).eval()
    expected = step(copied(model, memory_budget=1.0).eval(), x)
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for _ in range(3):
            torch.manual_seed(1)
            twin.zero_grad()
            checkpoint(twin, x, use_reentrant=False).square().sum().backward()
            assert all(map(torch.equal, [p.grad for p in twin.parameters()], expected[1:-4]))


class Outer(nn.Module):
    """A chain whose steps hold chains."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.ModuleList(Branch(2) for _ in range(2)) for _ in range(4))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        for inner, mix in zip(self.inner, self.mix, strict=True):
            y = mix(x)
            for branch in inner:
                y = y + branch(y)
            x = x + y
        return x


def test_chains_in_chains():
    torch.manual_seed(0)
    model, x = Outer(), torch.randn(4, WIDTH)
    found = [measured(copied(model, memory_budget=b), x) for b in TENTHS[::3]]
    kept, _, flops = zip(*found, strict=True)
    assert sorted(kept) == list(kept)
    assert sorted(flops, reverse=True) == list(flops)
    assert len(set(flops)) > 2
    expected = step(copied(model, memory_budget=1.0), x)
    net = copied(model, memory_budget=0.5)
    assert all(map(torch.equal, step(net, x), expected))
    assert all(map(torch.equal, step(net, x), expected))


def test_a_graph_module_divides_a_share_only(model):
    graph = mfx.trace(copy.deepcopy(model))
    x = torch.randn(6, 5, 8)
    expected = step(mfx.momentumize(graph, memory_budget=1.0), x)
    graph = mfx.trace(copy.deepcopy(model))
    net = mfx.momentumize(graph, memory_budget=0.5)
    assert all(map(torch.equal, step(net, x), expected))
    for options in ({"memory_budget": "1GiB"}, {"recompute": "all"}):
        with pytest.raises(mfx.MfxError, match="for a net as a whole and need the model itself"):
            mfx.momentumize(graph, **options)


def test_a_compiled_graph_has_a_budget(model):
    """Counted by runs of a step: Dynamo runs what it has compiled as it was written as soon as a meter is active."""
    x = torch.randn(6, 5, 8)
    runs = {}
    for budget in (0.0, 0.5, 1.0):
        compiled = torch.compile(
            copy.deepcopy(model), backend="mfx", options={"memory_budget": budget, "inner": counting(runs, budget)}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of global hooks that other tests left
            step(compiled, x)
            runs[budget] = 0
            step(compiled, x)
        torch._dynamo.reset()
    assert runs[0.0] > runs[0.5] > runs[1.0]


def counting(runs, key):
    def backend(module, inputs):
        def run(*values):
            runs[key] = runs.get(key, 0) + 1
            return module(*values)

        return run

    return backend


@pytest.mark.parametrize(
    "text, size",
    [("24GiB", 24 * 2**30), ("512 MiB", 2**29), ("1.5kB", 1500), (2**30, 2**30), (2e9, 2 * 10**9), ("7", 7)],
)
def test_numbers_of_bytes(text, size):
    assert MemoryBudget.of(text) == MemoryBudget(None, size)


def test_small_numbers_are_shares():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [MemoryBudget.of(b).share for b in (0, 1, 0.0, 0.5, 1.0)] == [0.0, 1.0, 0.0, 0.5, 1.0]
