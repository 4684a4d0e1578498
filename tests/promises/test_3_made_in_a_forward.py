"""Parameters, buffers and modules that a model makes in its first call are made for real, and once."""

import pytest
import torch
from torch import nn

import mfx
from tests.sampling import grid


class Makes(nn.Module):
    """sin(fc(x)) and what is made when the first input is there."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)


class Module(Makes):
    def forward(self, x):
        if not hasattr(self, "more"):
            self.more = nn.Linear(x.shape[-1], 4)
        return torch.sin(self.fc(x)) + self.more(x) / 9


class ModuleForNone(Makes):
    def __init__(self):
        super().__init__()
        self.more = None

    def forward(self, x):
        if self.more is None:
            self.more = nn.Linear(x.shape[-1], 4)
        return torch.sin(self.fc(x)) + self.more(x) / 9


class InList(Makes):
    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList()

    def forward(self, x):
        if not len(self.more):
            self.more.append(nn.Linear(x.shape[-1], 4))
        return torch.sin(self.fc(x)) + self.more[0](x) / 9


class InDict(Makes):
    def __init__(self):
        super().__init__()
        self.more = nn.ModuleDict()

    def forward(self, x):
        if (key := str(x.shape[-1])) not in self.more:
            self.more[key] = nn.Linear(x.shape[-1], 4)
        return torch.sin(self.fc(x)) + self.more[key](x) / 9


class ParameterForNone(Makes):
    def __init__(self):
        super().__init__()
        self.scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = nn.Parameter(torch.randn(x.shape[-1]))
        return torch.sin(self.fc(x)) * self.scale


class Buffer(Makes):
    def forward(self, x):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.randn(x.shape[-1]))
        return torch.sin(self.fc(x)) * self.scale


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.f = branch

    def forward(self, x):
        return x + self.f(x)


def model_of(kind, depth):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *(Block(kind()) for _ in range(depth)), nn.Linear(4, 4))


def trained(net):
    """Return outputs, gradients, random numbers and all tensors by name, of two training steps."""
    torch.manual_seed(1)
    found = {}
    for number in range(2):
        x = torch.randn(3, 4).requires_grad_()
        y = net(x)
        y.square().sum().backward()
        found |= {f"output {number}": y.detach(), f"input {number}": x.grad, f"random {number}": torch.rand(1)}
    found |= {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    return found | dict(net.state_dict())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(found[name]) is type(tensor)
        assert torch.equal(found[name], tensor), name


KINDS = [Module, ModuleForNone, InList, InDict, ParameterForNone, Buffer]


@pytest.mark.filterwarnings("ignore:.*cannot be captured as one graph")
@grid(8, kind=KINDS, capture=["auto", "dynamo"])
def test_at_gamma_zero_it_is_the_model(kind, capture):
    net = mfx.momentumize(model_of(kind, 3), gamma=0.0, capture=capture)
    assert_same(trained(net), trained(model_of(kind, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_with_momentum_the_budget_changes_nothing(kind):
    net, kept = (mfx.momentumize(model_of(kind, 13), gamma=0.9, memory_budget=budget) for budget in (0.0, 1.0))
    assert_same(trained(net), trained(kept))
