"""Graphs of Dynamo's that hold for several sizes have the chains of those that hold for one."""

import torch
from torch import nn

import mfx
from mfx.net.forward import forward_of


class Scanning(nn.Module):
    """Each block fills a cache that it hands out, and computes a number of the length that Dynamo shares by all."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        caches = []
        for block in self.blocks:
            padded = nn.functional.pad(block(x), (0, 0, 3, 0))
            cache = torch.zeros(len(x), 4)
            cache.copy_(padded[:, -1])
            caches.append(cache)
            x = x + torch.tanh(padded[:, -x.shape[1] :])
        return x, caches


def test_sizes_do_not_stand_behind_a_cache_that_is_filled():
    torch.manual_seed(0)
    model = Scanning()
    net, plain = (mfx.momentumize(model, gamma=gamma, capture="dynamo") for gamma in (0.5, 0.0))
    for length in (5, 6, 7):
        x = torch.randn(2, length, 4)
        net(x)
        (y, caches), (expected, expected_caches) = plain(x), model(x)
        assert torch.equal(y, expected)
        assert all(map(torch.equal, caches, expected_caches))
    assert [graph.chain_lengths for graph in forward_of(net).table.graphs] == [{"root": 3}] * 2
