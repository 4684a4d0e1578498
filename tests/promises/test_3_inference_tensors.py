"""Models that hold or are given tensors made in inference mode: calls do with them what they do without mfx."""

import copy

import pytest
import torch
from torch import nn

import mfx


class Own(nn.Module):
    """A tensor that is no buffer, changed in place."""

    def __init__(self):
        super().__init__()
        self.trace = torch.ones(4)

    def forward(self, x):
        self.trace.mul_(0.5).add_(x.detach().mean(0).abs())
        return x / (1 + self.trace)


class Buffer(nn.Module):
    """A buffer, changed in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Net(nn.Module):
    """Steps x + f(x)."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), kind()) for _ in range(3))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.mark.parametrize("kind", [Own, Buffer, lambda: nn.BatchNorm1d(4)], ids=["own", "buffer", "statistics"])
def test_calls_change_what_was_copied_in_inference_mode(kind):
    model = Net(kind)
    x = torch.randn(3, 4)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    with torch.inference_mode():
        model, net = copy.deepcopy(model), copy.deepcopy(net)
        for _ in range(2):
            assert torch.equal(net(x), model(x))
        for a, b in zip(net.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


class Seen(nn.Module):
    """A list of what earlier calls saw, added to the values."""

    def __init__(self):
        super().__init__()
        self.seen = [torch.zeros(4)]

    def forward(self, x, mask=None):
        self.seen = [*self.seen[-2:], x.detach().mean(0)]
        return x.tanh() + self.seen[0]


class Masked(nn.Module):
    """Adds an argument of the call."""

    def forward(self, x, mask):
        return x.tanh() + mask


class Added(nn.Module):
    """Steps x + f(x, mask)."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.kinds = nn.ModuleList(kind() for _ in range(4))

    def forward(self, x, mask):
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            x = x + kind(layer(x), mask)
        return x


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("kind", [Seen, Masked])
def test_a_step_in_training_reads_what_was_made_in_inference_mode(kind, gamma, capture):
    model = Added(kind)
    reference = mfx.momentumize(copy.deepcopy(model), gamma=gamma, memory_budget=1.0) if gamma else model
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma, capture=capture)
    with torch.inference_mode():
        x, mask = torch.randn(3, 4), torch.randn(3, 4)
        assert torch.equal(net(x, mask), reference(x, mask))
    for _ in range(2):
        y = torch.randn(3, 4)
        found, expected = net(y, mask), reference(y, mask)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(net.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


class Outer(nn.Module):
    """Steps whose branches are chains that read an argument."""

    def __init__(self, kind):
        super().__init__()
        self.inner = nn.ModuleList(Added(kind) for _ in range(2))

    def forward(self, x, mask):
        for inner in self.inner:
            x = x + inner(x.cos(), mask).tanh()
        return x


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_chain_in_a_step_reads_it_again_as_a_copy(gamma):
    model = Outer(Masked)
    with torch.inference_mode():
        mask = torch.randn(3, 4)
    reference = mfx.momentumize(copy.deepcopy(model), gamma=gamma, memory_budget=1.0) if gamma else model
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma)
    for _ in range(2):
        y = torch.randn(3, 4)
        found, expected = net(y, mask), reference(y, mask)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(net.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


class Shift(nn.Module):
    """Takes a stream that no operation saves for its backward pass."""

    def __init__(self):
        super().__init__()
        self.shifts = nn.ParameterList(torch.randn(4) for _ in range(4))

    def forward(self, x):
        for shift in self.shifts:
            x = x + (x * 0.5 + torch.cos(shift))
        return x


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_stream_itself_may_be_one(gamma):
    model = Shift()
    with torch.inference_mode():
        x = torch.randn(3, 4)
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma)
    reference = mfx.momentumize(copy.deepcopy(model), gamma=gamma, memory_budget=1.0) if gamma else model
    with torch.no_grad():
        assert torch.equal(net(x), reference(x))
    found, expected = net(x), reference(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
