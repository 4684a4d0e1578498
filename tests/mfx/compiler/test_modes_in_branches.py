"""Branches that enter a mode, or differentiate, inside of what is compiled."""

import copy

import pytest
import torch
from torch import nn

import mfx


class Branch(nn.Module):
    """Scaled by a number that is computed in a mode of its own."""

    def __init__(self, mode):
        super().__init__()
        self.fc, self.mode = nn.Linear(8, 8), mode
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        y = self.fc(x)
        if self.mode == "no_grad":
            with torch.no_grad():
                self.mean.lerp_(y.mean(0), 0.1)
                k = y.mean()
        elif self.mode == "grad":
            with torch.enable_grad():
                z = y.detach().requires_grad_()
                (k,) = torch.autograd.grad(z.square().sum(), z)
        elif self.mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                k = torch.mm(y, y.t()).float().mean()
        return torch.tanh(y) * k


class Net(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.branches = nn.ModuleList(Branch(mode) for _ in range(3))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def trained(net, x):
    for _ in range(2):
        net(x).square().sum().backward()
    return [p.grad for p in net.parameters()], list(net.buffers())


@pytest.mark.filterwarnings("ignore")  # Dynamo's, of graph breaks
@pytest.mark.parametrize(
    ("mode", "how"),
    [("no_grad", "net"), ("no_grad", "backend"), ("grad", "net"), ("autocast", "net"), ("autocast", "backend")],
)
def test_modes_in_branches(mode, how):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Net(mode), torch.randn(5, 8)
    expected = trained(mfx.momentumize(copy.deepcopy(model), gamma=0.9, memory_budget=1.0), x)
    if how == "net":
        compiled = torch.compile(mfx.momentumize(model, gamma=0.9), backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="mfx", options={"gamma": 0.9, "inner": "aot_eager"})
    # Float32, three steps: sums in another order err by some 1e-6, which bfloat16 may round the other way.
    rtol = 2e-2 if mode == "autocast" else 1e-4
    torch.testing.assert_close(trained(compiled, x), expected, rtol=rtol, atol=1e-5)
