"""A chain inside another one's branch, whose steps share sizes of their own stream."""

import torch
from torch import nn

import mfx


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.a, self.b = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x):
        y = self.c(x)
        a = y.mean(1, keepdim=True).expand_as(y) * 1
        batch, channels, height, width = a.shape
        a = a + self.a(a).flatten(2).reshape(batch, channels, height, width)
        a = a + self.b(a).flatten(2).reshape(batch, channels, height, width)
        return x + y * a


def output_and_grads(model, net, x):
    model.zero_grad()
    y = net(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def test_nested_chains_share_their_sizes():
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 4, 3, 3)
    net = mfx.momentumize(model)
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [2, 2, 2]
    found = output_and_grads(model, net, x)
    assert all(map(torch.equal, found, output_and_grads(model, mfx.momentumize(model, memory_budget=1.0), x)))
    plain = output_and_grads(model, model, x)
    assert all(map(torch.equal, output_and_grads(model, mfx.momentumize(model, gamma=0.0), x), plain))
    assert not torch.equal(found[0], plain[0])
