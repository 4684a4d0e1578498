"""The elementwise work of exact arithmetic, a block at a time."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from mfx.engine.arithmetic.blocks import blocks
from mfx.engine.arithmetic.digit_store import divide, multiply
from mfx.engine.arithmetic.integers import ONE, nearest
from mfx.engine.arithmetic.signed import UpdateGamma


class Kernels(Protocol):
    """Steps of the int64 tensors ``x``, ``v`` and ``top``, in place. All implementations give the same integers."""

    def advance(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, out: Tensor, kind: str, gamma: UpdateGamma) -> None:
        """V ← γ·v + (1−γ)·f, x ← x + v; write the value of x to ``out``."""
        ...

    def retreat_x(self, x: Tensor, v: Tensor, out: Tensor) -> None:
        """X ← x − v; write its value to ``out``."""
        ...

    def retreat_v(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        """V ← (v − (1−γ)·f) / γ."""
        ...


class BlockKernels(Kernels):
    """Operations of torch, which are quick while what they work on is in the cache."""

    @override
    def advance(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, out: Tensor, kind: str, gamma: UpdateGamma) -> None:
        for a, b, t, f, part, *signs in blocks(x, v, top, y, out, *gamma.signs_like(x)):
            multiply(b, t, gamma.numerator, gamma.denominator)
            for sign in signs:  # of γ·v; whether before or after |γ| makes no other digits
                b.mul_(sign)
            b.add_(increment(f, a, kind, gamma, *signs))
            read(a.add_(b), part)

    @override
    def retreat_x(self, x: Tensor, v: Tensor, out: Tensor) -> None:
        for a, b, part in blocks(x, v, out):
            read(a.sub_(b), part)

    @override
    def retreat_v(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        for a, b, t, f, *signs in blocks(x, v, top, y, *gamma.signs_like(x)):
            b.sub_(increment(f, a, kind, gamma, *signs))
            for sign in signs:
                b.mul_(sign)
            divide(b, t, gamma.numerator, gamma.denominator)


BLOCK_KERNELS: Kernels = BlockKernels()


def increment(y: Tensor, x: Tensor, kind: str, gamma: UpdateGamma, *signs: Tensor) -> Tensor:
    """Return (1−γ)·f as integers: the one formula that both directions use.

    Args:
        y: the branch's value.
        x: the stream, as integers.
        kind: of the step.
        gamma: γ.
        *signs: of γ at these elements, if it has signs.
    """
    f, complement = y.to(torch.float64, copy=True), gamma.complement_at(*signs)
    if kind == "residual":
        return nearest(f.mul_(complement * ONE))
    F = nearest(f.mul_(ONE)).sub_(x)  # in the memory of f
    return nearest(f.copy_(F).mul_(complement))


def read(x: Tensor, out: Tensor) -> None:
    """Write the values of integers ``x`` to ``out``."""
    out.copy_(x.to(torch.float64).mul_(1 / ONE))
