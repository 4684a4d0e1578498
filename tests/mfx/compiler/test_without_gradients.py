"""Compiled nets are called without gradients and in inference mode, before training and in between."""

import pytest
import torch
from torch import nn

import mfx


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        with torch.no_grad():
            scale = h.mean()
        return x + self.last(h * scale)


def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def compiled(how):
    torch._dynamo.reset()
    if how == "backend":
        return torch.compile(model(), backend="mfx", options={"gamma": 0.0, "inner": "eager"})
    return torch.compile(mfx.momentumize(model(), gamma=0.0), backend="eager")


def trained(net, x):
    net.zero_grad()
    y = net(x)
    y.sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in net.parameters())]


@pytest.mark.parametrize("how", ["net", "backend"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_they_compute_the_same_and_can_be_trained(how, mode):
    plain, net, x = model(), compiled(how), torch.randn(2, 4)
    for _ in range(2):
        with mode():
            assert torch.equal(net(x), plain(x))
            assert net(x).is_inference() == plain(x).is_inference()
        assert all(map(torch.equal, trained(net, x), trained(plain, x)))
