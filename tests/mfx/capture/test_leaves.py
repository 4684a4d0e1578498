"""A module that a symbolic trace cannot walk through is called as a whole; the chain around it stays."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mfx
from tests.models.step import assert_bit_equal, train_step


class Branch(nn.Module):
    """A branch with one line that a trace cannot follow."""

    def __init__(self, look, dim=8) -> None:
        super().__init__()
        self.look = look
        self.norm, self.fc = nn.BatchNorm1d(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.look(F.dropout(self.fc(self.norm(x)), 0.2, self.training))


class Net(nn.Module):
    def __init__(self, look) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branch(look) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def decision(y):
    return y / 2 if y.abs().max() > 1 else y


def item(y):
    return y * min(float(y.detach().abs().max()), 2.0)


def through_numpy(y):
    return y * torch.from_numpy(numpy.tanh(y.detach().numpy()))


def tried(y):
    try:
        if y.isnan().any():
            raise ValueError("not a number")
    except ValueError:
        y = torch.zeros_like(y)
    return y


def rows(y):
    return torch.stack([row.tanh() for row in (part for part in y)])


def drawn(y):
    return y * random.choice((0.5, 1.0))


def listed(y):
    return y * torch.tensor(y.detach().mean(0).tolist())


LOOKS = (decision, item, tried, rows, listed)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_leaf_keeps_the_chain_around_it(look, arithmetic):
    torch.manual_seed(0)
    model, inputs = Net(look), (torch.randn(4, 8),)
    net = mfx.momentumize(model, gamma=0.0, arithmetic=arithmetic)
    for training in (True, False):
        model.train(training), net.train(training)
        assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
        assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]
