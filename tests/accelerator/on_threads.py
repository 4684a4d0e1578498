"""Autograd has a thread for each device: nodes of one branch that lie on two ask at the same time."""

import sys
import time

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.accelerator import device as fake
from tests.accelerator.nets import WIDTH, batch, momentumized, stack, trained


class Offloaded(nn.Module):
    """A branch of which one part runs on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.begin = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.begin.register_forward_pre_hook(lambda *args: time.sleep(0.006 * mfx.recomputing()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(x)
        here = torch.tanh(self.inner(h))
        there = torch.tanh(h.to("cpu") * 2).to("fake")  # the last one, so its node is the first
        return x + (here + there)


@pytest.fixture
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("arithmetic, gamma", [("exact", 0.9), ("float", 0.9), ("exact", 0.0)])
def test_two_threads_rebuild_one_after_the_other(arithmetic, gamma, switching):
    options = {"arithmetic": arithmetic, "gamma": gamma}
    kept = trained(momentumized(stack(Offloaded), memory_budget=1.0, **options), batch())
    net = momentumized(stack(Offloaded), **options)
    for _ in range(3):
        for a, b in zip(trained(net, batch()), kept, strict=True):
            error = (a - b).abs().max() / b.abs().max()
            assert error <= (1e-6 if arithmetic == "exact" else 1e-4)  # three gradients are added as they arrive
    assert len(fake.THREADS) > 1
