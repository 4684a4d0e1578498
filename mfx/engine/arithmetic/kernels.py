"""The work of exact arithmetic that is the same for every element, a block at a time."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from mfx.engine.arithmetic.blocks import blocks
from mfx.engine.arithmetic.digit_store import divide, multiply
from mfx.engine.arithmetic.integers import ONE, as_float, nearest
from mfx.options.gamma import Gamma


class Kernels(Protocol):
    """How the integers ``x``, ``v`` and ``top``, all of one dtype, float64 or int64, move by a step; written over.

    Whoever does it, the integers are the same.
    """

    def advance(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, out: Tensor, kind: str, gamma: Gamma) -> None:
        """V ← γ·v + (1−γ)·f, x ← x + v, and what x stands for to ``out``."""
        ...

    def retreat_x(self, x: Tensor, v: Tensor, out: Tensor) -> None:
        """X ← x − v, and what it stands for to ``out``."""
        ...

    def retreat_v(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, kind: str, gamma: Gamma) -> None:
        """V ← (v − (1−γ)·f) / γ."""
        ...


class BlockKernels(Kernels):
    """By operations of torch, which are quick while what they work on is in the cache."""

    @override
    def advance(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, out: Tensor, kind: str, gamma: Gamma) -> None:
        n, d = gamma.numerator, gamma.denominator
        for a, b, t, f, part, scratch, more in blocks(x, v, top, y, out, scratch=2):
            F = increment(f, a, kind, gamma, scratch)
            multiply(b, t, n, d, more.view(b.dtype))
            read(a.add_(b.add_(F)), part, scratch)

    @override
    def retreat_x(self, x: Tensor, v: Tensor, out: Tensor) -> None:
        for a, b, part, scratch in blocks(x, v, out, scratch=1):
            read(a.sub_(b), part, scratch)

    @override
    def retreat_v(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, kind: str, gamma: Gamma) -> None:
        for a, b, t, f, scratch, more in blocks(x, v, top, y, scratch=2):
            b.sub_(increment(f, a, kind, gamma, scratch))
            divide(b, t, gamma.numerator, gamma.denominator, more.view(b.dtype))


BLOCK_KERNELS: Kernels = BlockKernels()


def increment(y: Tensor, x: Tensor, kind: str, gamma: Gamma, scratch: Tensor) -> Tensor:
    """(1−γ)·f as integers, in ``scratch``: the one formula that both directions use."""
    t = scratch.copy_(y)
    if kind == "residual":
        return nearest(t.mul_(gamma.complement * ONE), x.dtype)
    F = nearest(t.mul_(ONE), x.dtype).sub_(x)
    return nearest(as_float(F, scratch).mul_(gamma.complement), x.dtype)


def read(x: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Write what integers ``x`` stand for to ``out``."""
    if x.dtype == torch.float64 and out.dtype != torch.float16:
        # A power of two commutes with rounding wherever the exponent has room.
        out.copy_(x).mul_(1 / ONE)
    else:
        out.copy_(torch.mul(as_float(x, scratch), 1 / ONE, out=scratch))
