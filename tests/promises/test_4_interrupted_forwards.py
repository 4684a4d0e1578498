"""Gradients of what a forward pass had computed when an exception ended it, as those who look for features do."""

import pytest
import torch
from torch import nn

import mfx
from tests.oracles import momentum_reference
from tests.sampling import grid

DEPTH = 13  # walked back at γ = 0.9
AT = 9  # the step whose hook ends the forward pass


class Stopped(Exception):  # noqa: N818
    """Ends a forward pass when all that is asked for is there."""


class Interrupted(BaseException):
    """No Exception, as KeyboardInterrupt is none."""


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.drop(torch.sin(self.first(x))))


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.f = branch

    def forward(self, x):
        return x + self.f(x)


def flat():
    torch.manual_seed(0)
    return nn.Sequential(*(Block(Branch()) for _ in range(DEPTH))).double()


def nested():
    """Chains in a step of a chain."""
    torch.manual_seed(0)
    inner = [nn.Sequential(*(Block(Branch()) for _ in range(3)), nn.Linear(4, 4)) for _ in range(DEPTH)]
    return nn.Sequential(*map(Block, inner)).double()


def hooked_of(net):
    """Return the layer whose hook ends the forward pass: in the middle of a step."""
    f = net[AT].f
    return f.first if isinstance(f, Branch) else f[1].f.first


def interrupted(net, error, *, again):
    """Return gradients of what a hook saw before it ended the forward pass, and of a whole call after it."""
    seen = []

    def stop(module, args, output):
        seen.append(output)
        raise error

    for _ in range(2):
        handle = hooked_of(net).register_forward_hook(stop)
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
        with pytest.raises(error):
            net(x)
        handle.remove()
        for number in range(1 + again):
            seen[0].square().sum().backward(retain_graph=number < again)
        found = [seen[0].detach(), x.grad, *(p.grad for p in net.parameters())]
        seen.clear()
        net.zero_grad()
    y = net(x.detach())
    y.sum().backward()
    return [*found, y, *(p.grad for p in net.parameters())]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@grid(8, build=[flat, nested], error=[Stopped, Interrupted], again=[False, True], capture=["symbolic", "dynamo"])
def test_at_gamma_zero_they_are_the_models(build, error, again, capture):
    net = mfx.momentumize(build(), gamma=0.0, capture=capture)
    assert_same(interrupted(net, error, again=again), interrupted(build(), error, again=again))


@grid(8, build=[flat, nested], error=[Stopped, Interrupted], again=[False, True], budget=[0.0, 0.5])
def test_with_momentum_the_budget_changes_nothing(build, error, again, budget):
    net, kept = (mfx.momentumize(build(), gamma=0.9, memory_budget=b) for b in (budget, 1.0))
    assert_same(interrupted(net, error, again=again), interrupted(kept, error, again=again))


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_with_momentum_they_are_the_recurrences(arithmetic):
    net, model = mfx.momentumize(flat(), gamma=0.9, arithmetic=arithmetic), flat()
    found = interrupted(net, Stopped, again=False)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    stream = momentum_reference([block.f for block in model[:AT]], x, 0.9).output
    output = model[AT].f.first(stream)
    output.square().sum().backward()
    for a, b in zip(found, [output, x.grad, *(p.grad for p in model.parameters())], strict=False):
        if b is not None:
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-8)  # the fixed point rounds the stream to 1e-10
