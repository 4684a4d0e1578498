"""Chains in the branches of chains, with BatchNorm at every level: a step's buffers are its own, whoever is around."""

import copy
import sys

import pytest
import torch
from torch import nn

import mfx
from mfx.engine.recompute.layout import StateLayout
from tests.sampling import grid


class Block(nn.Module):
    """x + f(x), where f may hold blocks itself."""

    def __init__(self, *inside):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), *inside)

    def forward(self, x):
        return x + self.f(x)


def nest(depth, count):
    """Blocks in sequence, each of which holds as many in its branch, and so on."""
    return nn.Sequential(*(Block(*(nest(depth - 1, count) if depth > 1 else ())) for _ in range(count)))


class U(nn.Module):
    """Blocks, a smaller U around which there is a skip, and blocks."""

    def __init__(self, depth):
        super().__init__()
        self.down, self.up = nest(1, 2), nest(1, 2)
        self.inner = U(depth - 1) if depth > 1 else Block()

    def forward(self, x):
        x = self.down(x)
        x = x + self.inner(x)
        return self.up(x)


class Stem(nn.Module):
    """BatchNorm before, between and after nested chains, to be run again by recompute="all"."""

    def __init__(self):
        super().__init__()
        self.stem, self.between, self.head = (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(3))
        self.first, self.second = nest(2, 2), U(2)

    def forward(self, x):
        return self.head(self.second(self.between(self.first(self.stem(x)))))


class Shared(nn.Module):
    """One BatchNorm read at all levels."""

    def __init__(self):
        super().__init__()
        self.blocks = nest(3, 2)
        norm = self.blocks[0].f[1]
        for block in self.blocks.modules():
            if isinstance(block, Block):
                block.f[1] = norm

    def forward(self, x):
        return self.blocks(x)


MODELS = {"nest": lambda: nest(3, 3), "U": lambda: U(3), "stem": Stem, "shared": Shared}
HOW = [("exact", 0.0), ("exact", 0.9), ("float", 0.0), ("float", 0.9)]
STORAGE = {
    "0": {},
    ".5": {"memory_budget": 0.5},
    "1": {"memory_budget": 1.0},
    "all": {"recompute": "all"},
    "all, .5": {"recompute": "all", "memory_budget": 0.5},
}
REBUILT, CONDITION = 1e-10, 30
"""The error that arithmetic "float" allows itself in a rebuilt state of float64, and how much it grows on its way to a
gradient: BatchNorm divides it by the spread of a few numbers."""


def three_steps(net):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    outputs = []
    for _ in range(3):
        outputs.append(net(x))
        outputs[-1].square().mean().backward()
    grads = [x.grad, *(p.grad for p in net.parameters())]
    return [*(y.detach() for y in outputs), *net.buffers()], grads


@grid(2 * len(STORAGE), model=MODELS, storage=STORAGE, how=HOW)
def test_three_deep_from_the_first_call_on(model, storage, how):
    torch.manual_seed(0)
    plain = model().double()
    arithmetic, gamma = how
    net = mfx.momentumize(copy.deepcopy(plain), arithmetic=arithmetic, gamma=gamma, **storage)
    if gamma:
        plain = mfx.momentumize(plain, arithmetic=arithmetic, gamma=gamma, memory_budget=1.0)
    (found, grads), (expected, expected_grads) = three_steps(net), three_steps(plain)
    assert all(map(torch.equal, found, expected))
    if how != ("float", 0.9):
        assert all(map(torch.equal, grads, expected_grads))
    scale = max(g.abs().max() for g in expected_grads)
    assert all((g - e).abs().max() <= CONDITION * REBUILT * scale for g, e in zip(grads, expected_grads, strict=True))


def watched(net):
    """The number of modules that the layouts of all steps of a net watch, each time that one is made or looked at."""
    count, looks = 0, (StateLayout.__init__.__code__, StateLayout.holds.__code__)

    def profile(frame, event, arg):
        nonlocal count
        if event == "return" and frame.f_code in looks:
            count += len(frame.f_locals["self"].modules)

    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):  # the second one goes by a plan
        net(x).sum().backward()
    sys.setprofile(profile)
    try:
        net(x).sum().backward()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_the_work_is_linear_in_depth(gamma):
    counts = []
    for length in (4, 8, 16):
        blocks = [Block(*nest(1, 2)) for _ in range(length)]
        counts.append(watched(mfx.momentumize(nn.Sequential(*blocks).double(), gamma=gamma)))
    assert counts[1] - counts[0] == (counts[2] - counts[1]) / 2 > 0
