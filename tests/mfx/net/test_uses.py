"""One chain that calls use a varying number of times is no other network, on whichever route it was captured."""

import copy

import pytest
import torch
from torch import nn

import mfx
from tests.sampling import grid


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


class Base(nn.Module):
    """Its chain is used n times: n is an argument, or an attribute where no argument says it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.drop = nn.Dropout(0.5)
        self.number = 1

    def by_recurrence(self, x, n, gamma):
        x, v = x.double(), torch.zeros_like(x).double()
        for block in [*self.blocks] * n:
            v = gamma * v + (1 - gamma) * torch.tanh(x @ block.f.weight.double().T + block.f.bias.double())
            x = x + v
        return x


class Looped(Base):
    def forward(self, x, n=None):
        for _ in range(self.number if n is None else n):
            x = self.blocks(x)
        return x


class Recursive(Base):
    def again(self, x, n):
        x = self.blocks(x)
        return x if n == 1 else self.again(x, n - 1)

    def forward(self, x, n=None):
        return self.again(x, self.number if n is None else n)


class Functional(Base):
    """The sums are the forward's own."""

    def forward(self, x, n=None):
        for _ in range(self.number if n is None else n):
            for block in self.blocks:
                x = x + torch.tanh(block.f(x))
        return x


class Listed(Base):
    """The length of a list tells how often; symbolic tracing does not take such a list."""

    def forward(self, x, n=None):
        for _ in [x] * (self.number if n is None else n):
            for position in range(len(self.blocks)):
                x = self.blocks[position](x)
        return x


class Once(Base):
    """A chain of one step that repeats."""

    def __init__(self):
        super().__init__()
        self.blocks = self.blocks[:1]

    def forward(self, x, n=None):
        for _ in range(1 + (self.number if n is None else n)):
            x = self.blocks[0](x)
        return x

    def by_recurrence(self, x, n, gamma):
        return super().by_recurrence(x, n + 1, gamma)


X = torch.linspace(-1, 1, 24).reshape(3, 8)
ROUTES = ["auto", "symbolic", "dynamo"]


@grid(
    12,
    build=[Looped, Recursive, Functional, Listed, Once],
    capture=ROUTES,
    numbers=[(1, 2, 3), (3, 1, 2)],
    by_argument=[True, False],
    gamma=[0.0, 0.5],
)
def test_each_call_is_of_one_network(build, capture, numbers, by_argument, gamma):
    torch.manual_seed(0)
    model = build()
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma, capture=capture)
    for position, number in enumerate(numbers):
        net.train(position != 1)
        net.number = number
        found = net(X, number) if by_argument else net(X)
        if gamma == 0.0:
            model.number = number
            assert torch.equal(found, model(X))
        torch.testing.assert_close(found.double(), model.by_recurrence(X, number, gamma), rtol=0, atol=1e-6)


@pytest.mark.parametrize("capture", ROUTES)
def test_weights_go_from_one_number_of_uses_to_another(capture):
    nets = [mfx.momentumize(Looped(), gamma=0.5, capture=capture) for _ in range(2)]
    for number, net in enumerate(nets, 2):
        net.number = number
        net(X)
        assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3 * number]
    nets[1].load_state_dict(nets[0].state_dict())
    torch.testing.assert_close(nets[1](X).double(), nets[0].by_recurrence(X, 3, 0.5), rtol=0, atol=1e-6)


class DropsBetween(Base):
    """Something lies between two uses in training only, and so they are two chains there."""

    def forward(self, x):
        x = self.blocks(x)
        return self.blocks(self.drop(x) if self.training else x)


class DropsBeforeTheLast(Base):
    """In training one block lies outside of the chain, which is shorter than the chain in evaluation."""

    def forward(self, x):
        x = self.blocks[0](self.blocks[0](x))
        return self.blocks[0](self.drop(x) if self.training else x)


@pytest.mark.parametrize("build", [DropsBetween, DropsBeforeTheLast])
@pytest.mark.parametrize("capture", ROUTES)
def test_uses_in_a_row_in_one_mode_only_are_another_network(capture, build):
    net = mfx.momentumize(build(), gamma=0.5, capture=capture)
    net(X)
    with pytest.raises(mfx.MfxError, match="other chains in one call than in another"):
        net.eval()(X)
