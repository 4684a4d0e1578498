"""recompute="all": what lies between the chains is recomputed too, with the same results and less memory."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mfx
from mfx.engine.memory.cuts import NodeCost, SegmentCost, choose_cuts


class Block(nn.Module):
    def __init__(self, width, out=None, norm=nn.BatchNorm2d):
        super().__init__()
        out = out or width
        self.conv = nn.Conv2d(width, out, 3, padding=1)
        self.norm = norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(width, out, 1) if out != width else None

    def forward(self, x):
        skip = x if self.shortcut is None else self.shortcut(x)
        return self.relu(self.norm(self.conv(x)) + skip)


class Net(nn.Module):
    """A stem with state and dice, two chains behind projections, a head that reads sizes, and a module called twice."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("calls", torch.zeros(()))
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.first = nn.Sequential(Block(8), Block(8), Block(8))
        self.second = nn.Sequential(Block(8, 6), Block(6), Block(6))
        self.mix = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x * self.scale)
        x = self.second(self.first(x))
        x = nn.functional.dropout(self.mix(self.mix(x).tanh()), 0.3, self.training)
        self.calls.add_(1)
        return self.head(x.view(x.size(0), x.size(1), -1).mean(2))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net()


def images():
    return torch.randn(4, 3, 12, 12)


def step(net, x, **autocast):
    torch.manual_seed(1)
    net.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
        out = net(x)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters()), *map(torch.clone, net.buffers()), torch.rand(3)]


def steps(model, x, times=3, **options):
    """Return what some training steps leave behind: the first without a plan, the others with one."""
    autocast = options.pop("autocast", {})
    net = mfx.momentumize(copy.deepcopy(model), verify="raise", **options)
    return [value for _ in range(times) for value in step(net, x, **autocast)]


@pytest.mark.parametrize("autocast", [{}, {"on": True}], ids=["float32", "autocast"])
@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_every_step_leaves_what_keeping_all_leaves(model, gamma, autocast):
    x = images()
    expected = steps(model, x, memory_budget=1.0, gamma=gamma, autocast=autocast)
    for budget in (0.0, 0.4):
        found = steps(model, x, memory_budget=budget, recompute="all", gamma=gamma, autocast=autocast)
        assert all(map(torch.equal, found, expected))


def memory(net, x):
    step(net, x)
    parameters = list(net.parameters())
    for parameter in parameters:
        parameter.grad = None
    with mfx.ActivationMeter(exclude=[x, *parameters]) as meter:
        out = net(x)
        kept = meter.live
        out.sum().backward()
        del out
    return kept, meter.peak


def test_it_keeps_less_at_every_budget(model):
    x = images()
    budgets = (0.0, 0.3, 0.6, 0.9, 1.0)
    found = [
        memory(mfx.momentumize(copy.deepcopy(model), recompute="all", memory_budget=b, verify="off"), x)
        for b in budgets
    ]
    chains_only = memory(mfx.momentumize(copy.deepcopy(model), verify="off"), x)
    counter = 8  # bytes of BatchNorm's, of which a recomputation has a copy
    assert all(a[0] < b[0] and a[1] <= b[1] + counter for a, b in pairwise(found))
    assert found[0][0] < 0.7 * chains_only[0]
    assert found[0][1] < chains_only[1]
    kept = [k for k, _ in found]
    assert all(k <= kept[0] + b * (kept[-1] - kept[0]) for k, b in zip(kept, budgets, strict=True))


def test_modules_between_run_twice_and_can_ask(model):
    net = mfx.momentumize(copy.deepcopy(model), recompute="all")
    step(net, images())
    seen = []
    net.mix.register_forward_hook(lambda *_: seen.append(mfx.recomputing()))
    step(net, images())
    assert seen == [False, False, True, True]
    seen.clear()
    with torch.no_grad():
        net(images())
    assert seen == [False, False]


class Unsteady(nn.Module):
    def forward(self, x):
        return x * (2 if mfx.recomputing() else 1)


def test_a_second_run_with_other_values_is_noticed(model):
    model = copy.deepcopy(model)
    model.stem[1] = Unsteady()
    net = mfx.momentumize(model, recompute="all", verify="raise")
    for _ in range(2):
        with pytest.raises(mfx.MfxError, match=r"between the chains, .*did not compute the values of the forward pass"):
            step(net, images())


class Changing(nn.Module):
    """In-place operations between the chains: within, on what a chain gave, and on the model's input."""

    def __init__(self, on_input):
        super().__init__()
        self.on_input = on_input
        self.chain = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.before, self.after, self.end = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        if self.on_input:
            x.mul_(2)
        y = self.before(x).tanh()
        z = y.sigmoid() + 1
        z.mul_(3)
        x = z * y
        for f in self.chain:
            x = x + f(x)
        x = x.relu_()
        return self.end(self.after(x).exp())


@pytest.mark.parametrize("on_input", [False, True])
def test_operations_in_place(on_input):
    torch.manual_seed(0)
    model = Changing(on_input)
    x = torch.randn(5, 6)
    expected = steps(model, x.clone(), 1, memory_budget=1.0) + steps(model, 2 * x if on_input else x, 1)
    net = mfx.momentumize(copy.deepcopy(model), recompute="all")
    found = step(net, given := x.clone()) + step(net, given)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_captured_by_dynamo_and_in_a_compiled_graph(model):
    x = images()
    expected = steps(model, x, 2, memory_budget=1.0)
    assert all(map(torch.equal, steps(model, x, 2, recompute="all", capture="dynamo"), expected))
    options = {"recompute": "all", "inner": "eager", "verify": "raise"}
    compiled = torch.compile(copy.deepcopy(model), backend="mfx", options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [value for _ in range(2) for value in step(compiled, x)]
    assert all(map(torch.equal, found, expected))
    torch._dynamo.reset()


def node(saved, *reads, changes=()):
    return NodeCost(saved, reads, 1, frozenset(changes))


def test_cuts_are_made_where_little_crosses():
    """a → b → c, d → e: between b and d, 1 byte crosses, elsewhere 50."""
    nodes = (node({1: 50}, "x"), node({2: 1}, "a"), node({2: 1, 3: 50}, "b"), node({4: 50}, "c"), node({}, "d"))
    values = {"a": {1: 50}, "b": {2: 1}, "c": {3: 50}, "d": {4: 50}, "e": {5: 1}, "x": {}}
    run = SegmentCost(nodes, values, ("a", "b", "c", "d", "e"), frozenset("e"))
    assert run.positions() == [2, 4]
    assert choose_cuts([run], 0) == [(2,)]
    assert choose_cuts([run], 200) == [()]  # a step of a chain holds more anyway: a cut would only keep a byte
    assert [(step.saved, step.input) for step in run.cost((2,)).steps] == [(50, 0), (100, 1)]


def test_no_cut_comes_before_a_change_of_what_was_there():
    nodes = (node({1: 9}, "x"), node({2: 1}, "a"), node({3: 9}, "b", changes=[2]), node({4: 9}, "c"))
    values = {"a": {1: 9}, "b": {2: 1}, "c": {2: 1}, "d": {4: 9}, "x": {}}
    run = SegmentCost(nodes, values, ("a", "b", "c", "d"), frozenset("d"))
    assert 2 not in run.positions()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=7), st.integers(0, 60))
def test_cuts_are_the_best_there_are(sizes, at_once):
    """Against trying all: what cuts keep and what the largest piece holds, together."""
    names = tuple(f"n{i}" for i in range(len(sizes)))
    reads = ("x", *names)
    nodes = tuple(node({2 * i: saved}, reads[i]) for i, (saved, _) in enumerate(sizes))
    values = {"x": {}} | {name: {2 * i + 1: size} for i, (name, (_, size)) in enumerate(zip(names, sizes, strict=True))}
    run = SegmentCost(nodes, values, names, frozenset(names[-1:]))

    def total(cuts):
        edges = [0, *cuts, len(nodes)]
        return max(at_once, *(run.saved(*edge) for edge in pairwise(edges))) + sum(map(run.live, cuts))

    possible = run.positions()
    every = [[p for i, p in enumerate(possible) if chosen >> i & 1] for chosen in range(2 ** len(possible))]
    assert total(choose_cuts([run], at_once)[0]) == min(map(total, every))
