"""Modules whose ``__dict__`` or tables are replaced by others, as copies and averages do: calls go by what is there."""

import copy

import torch
from torch import nn

import mfx
from tests.sampling import grid

WIDTH, DEPTH = 4, 3


class Counting(nn.Module):
    """A factor that falls with the number of calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (0.5 + 0.5 / self.calls)


class Net(nn.Module):
    """Steps with statistics, random numbers and, if asked for, a count of their own."""

    def __init__(self, own):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), *(kind() for kind in own), nn.Dropout(0.3))
            for _ in range(DEPTH)
        )

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def own_dict(module):
    module.__dict__ = dict(module.__dict__)


def all_tables(module):
    module.__dict__ = {name: dict(value) if type(value) is dict else value for name, value in vars(module).items()}


def buffers(module):
    module._buffers = dict(module._buffers)


def own_class(module):
    module.__class__ = type(type(module).__name__, (type(module),), {})


REPLACED = {f.__name__: f for f in (own_dict, all_tables, buffers, own_class)}


def held(modules):
    """Return what holds the state of modules."""
    return [each for module in modules for each in (vars(module), module._buffers, type(module))]


def train(model, replace, when):
    """Return all that is to be seen of three training steps; something is replaced in the second."""
    torch.manual_seed(1)
    outputs = []
    for number in range(3):
        inner = list(model.modules())[1:]
        if number == 1 and when == "before":
            for module in inner:
                replace(module)
        y = model(torch.randn(6, WIDTH))
        if number == 1 and when == "between":
            for module in inner:
                replace(module)
            tables = held(inner)
        y.pow(2).sum().backward()
        outputs.append(y.detach())
        if number == 1 and when == "between":
            assert all(a is b for a, b in zip(tables, held(inner), strict=True))
    counts = [torch.tensor(module.calls) for module in model.modules() if isinstance(module, Counting)]
    return [*outputs, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers()), *counts]


@grid(
    16,
    replace=REPLACED,
    when=["before", "between"],
    own={"statistics": [], "state": [Counting]},
    gamma=[0.0, 0.5],
)
def test_the_backward_pass_finds_what_the_forward_pass_had(replace, when, own, gamma):
    model = Net(own)
    expected = model if gamma == 0 else mfx.momentumize(model, gamma=gamma, memory_budget=1.0)
    found = train(mfx.momentumize(copy.deepcopy(model), gamma=gamma), replace, when)
    for a, b in zip(found, train(expected, replace, when), strict=True):
        assert torch.equal(a, b)
