"""Branches that talk to the other process: both run them again in the same order."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from tests.distributed.nets import HOW
from tests.distributed.world import SIZE
from tests.mfx.engine.chains import WIDTH, make_root, make_steps, run

DEPTH = 13


class SynchronisedNorm(nn.Module):
    """The same as nn.SyncBatchNorm on a GPU: statistics of all processes' rows together, running ones kept."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.linear(x)
        mean = all_reduce(y.mean(0)) / SIZE
        self.running_mean.lerp_(mean.detach(), 0.1)
        self.calls += 1
        return (y - mean) * torch.rsqrt(all_reduce((y - mean).square().mean(0)) / SIZE + 1e-5)


def train(how):
    results = []
    for budget in (0.0, 1.0):
        root = make_root(DEPTH, SynchronisedNorm)
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
        for _ in range(2):
            y = run(root, make_steps(root), x, arithmetic=how[0], gamma=how[1], memory_budget=budget).x
            y.square().mean().backward()
        results.append([x.grad, *(p.grad for p in root.parameters()), *root.buffers()])
    for found, expected in zip(*results, strict=True):
        if how[0] == "exact":
            assert torch.equal(found, expected)
        else:
            # rebuilt inputs are right to 2e-6, and normalising eight rows amplifies that
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    return [*root.buffers()]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_synchronised_normalisation(world, how):
    first, second = world.run(train, how)
    assert all(map(torch.equal, first, second))
