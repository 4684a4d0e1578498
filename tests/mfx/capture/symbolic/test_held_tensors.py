"""Tensors in containers and objects that a module holds: a graph is of those that are there when it runs."""

import copy
from collections import OrderedDict, deque, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mfx
from mfx.net.forward import forward_of

Pair = namedtuple("Pair", "tensor number")


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


HOLDERS = {  # how a tensor is held, and how it is read
    "attribute": (lambda t: t, lambda held: held),
    "list": (lambda t: [t], lambda held: held[0]),
    "tuple": (lambda t: (1, t), lambda held: held[1]),
    "named tuple": (lambda t: Pair(t, 1), lambda held: held.tensor),
    "deque": (lambda t: deque([t]), lambda held: held[0]),
    "dictionary": (lambda t: {"a": t}, lambda held: held["a"]),
    "ordered dictionary": (lambda t: OrderedDict(a=t), lambda held: held["a"]),
    "object": (Box, lambda held: held.tensor),
    "namespace": (lambda t: SimpleNamespace(tensor=t), lambda held: held.tensor),
    "list in a dictionary": (lambda t: {"a": [t]}, lambda held: held["a"][0]),
    "list in an object": (lambda t: Box([t]), lambda held: held.tensor[0]),
    "object in a list": (lambda t: [Box(t)], lambda held: held[0].tensor),
    "a list of any length": (lambda t: [t], sum),
}


class Net(nn.Module):
    def __init__(self, holder, *, computes):
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.hold, self.read = HOLDERS[holder]
        self.computes = computes
        self.put(1.0)

    def put(self, number):
        self.held = self.hold(torch.full((4,), number))

    def forward(self, x):
        for step in self.steps:
            read = self.read(self.held)
            x = x + torch.tanh(step(x)) * (read * 2 if self.computes else read)
        return x


@pytest.mark.parametrize("computes", [True, False], ids=["computed with", "read"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_tensor_that_is_replaced(holder, computes):
    model, x = Net(holder, computes=computes), torch.linspace(-1, 1, 8).reshape(2, 4)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for number in (1.0, 2.0, 3.0):
        model.put(number), net.put(number)
        assert torch.equal(net(x), model(x))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


@pytest.mark.parametrize("computes", [True, False], ids=["computed with", "read"])
def test_a_list_that_grows(computes):
    model, x = Net("a list of any length", computes=computes), torch.linspace(-1, 1, 8).reshape(2, 4)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for _ in range(3):
        assert torch.equal(net(x), model(x))
        model.held.append(torch.ones(4)), net.held.append(torch.ones(4))


def test_a_tensor_that_is_read_may_change_in_place_without_another_graph():
    net, x = mfx.momentumize(Net("list", computes=False), gamma=0.0), torch.ones(2, 4)
    model = Net("list", computes=False)
    for _ in range(3):
        assert torch.equal(net(x), model(x))
        net.held[0].mul_(2), model.held[0].mul_(2)
    assert len(forward_of(net).table.graphs) == 1
