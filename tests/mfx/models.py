"""Small models of the usual shapes, and what several tests ask of a net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfx

WIDTH = 8


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Block(nn.Module):
    """Two residual steps, as in a pre-norm transformer."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0, functional: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, dropout)
        self.p = functional

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.mix(self.norm1(x)), self.p, self.training)
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Something before the chain, blocks, something after; one parameter that nobody reads."""

    def __init__(self, depth: int = 3, width: int = WIDTH, dropout: float = 0.0, functional: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, dropout, functional) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.unused = nn.Parameter(torch.zeros(2))
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def describe(self) -> str:
        return f"{len(self.blocks)} blocks, {self.note}"


class ConvBlock(nn.Module):
    """One step of kind "map": the activation follows the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self, depth: int = 3, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.layers = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x)).mean((2, 3))


class Masked(nn.Module):
    """Arguments of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, twice: bool = False) -> Tensor:
        for fc in self.fcs:
            f = fc(x) * scale
            if mask is not None:
                f = f * mask
            x = x + f
        return 2 * x if twice else x


def inputs(batch: int = 2, width: int = WIDTH, **kwargs: object) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(1), **kwargs)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 5, 5, generator=torch.Generator().manual_seed(1))


def recurrence(
    x: Tensor, branches: Sequence[Callable[[Tensor], Tensor]], gamma: float, v: Tensor | float = 0.0
) -> Tensor:
    """v ← γ·v + (1−γ)·f(x), x ← x + v, as the paper writes it."""
    for f in branches:
        v = gamma * v + (1 - gamma) * f(x)
        x = x + v
    return x


def stack_recurrence(model: Stack, x: Tensor, gamma: float) -> Tensor:
    """Return what a momentumized Stack without dropout computes."""
    branches: list[Callable[[Tensor], Tensor]] = []
    for block in model.blocks:
        branches.append(lambda x, b=block: b.mix(b.norm1(x)))
        branches.append(lambda x, b=block: b.mlp(b.norm2(x)))
    return model.head(recurrence(model.embed(x), branches, gamma))


@contextmanager
def counting(module: nn.Module):
    """Notes for every forward call of a module whether it was a recomputation."""
    calls: list[bool] = []
    handle = module.register_forward_hook(lambda *_: calls.append(mfx.recomputing()))
    try:
        yield calls
    finally:
        handle.remove()


def assert_reversible(net: nn.Module, inner: nn.Module, x: Tensor) -> None:
    """A training step runs a module inside a branch once forward and once more in the backward pass."""
    with counting(inner) as calls:
        net(x).sum().backward()
    assert calls == [False, True]
