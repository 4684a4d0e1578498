"""Models that hold tensors made in inference mode: calls in that mode change them in place, as without mfx."""

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
