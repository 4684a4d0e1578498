"""Integers as int64 or, up to ``SMALL``, as float64: a CPU computes with those eight at a time, with int64 one by one.

Both give the same integers, so which one is taken changes nothing but the time. A tensor's dtype says which it is.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ONE = 2.0**40  # 1.0 in fixed point
SMALL = 2**50


def nearest(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The integers nearest to float64 ``t``, ties to even, as ``dtype``; written over it, in the same eight bytes.

    Args:
        t: numbers below 2⁶³ in magnitude.
        dtype: int64 or float64.
    """
    t.round_()
    # Element for element: what is read has not been written over yet.
    return t if dtype == torch.float64 else t.view(dtype).copy_(t)


def as_float(a: Tensor, scratch: Tensor) -> Tensor:
    """Integers ``a`` as float64: themselves if they are, else in ``scratch``, which may be the same bytes."""
    return a if a.dtype == torch.float64 else scratch.copy_(a)


def floor_divide(a: Tensor, b: int, out: Tensor) -> Tensor:
    """⌊a/b⌋ for integers ``a``, 0 < b ≤ 2¹⁴.

    As float64 it is (a − (b−1)/2)/b to the nearest: that differs from ⌊a/b⌋ by at most 1/2 − 1/(2b). Multiplying by a
    rounded 1/b instead, and rounding product and sum, moves it by less than 3·2⁻⁵³·|a|/b + 2⁻⁵³, which is below 1/(2b)
    for |a| < 2⁵⁰.

    Args:
        a: integers, as float64 below ``SMALL`` in magnitude; left as they are.
        b: the divisor.
        out: where to write, of the dtype of ``a`` and not ``a`` itself.
    """
    if a.dtype == torch.int64:
        return torch.div(a, b, rounding_mode="floor", out=out)
    return torch.add(_half(b), a, alpha=1 / b, out=out).round_()


@cache
def _half(b: int) -> Tensor:
    """−(b−1)/(2b), on the CPU: float64 stands for integers only there."""
    return torch.tensor((1 - b) / (2 * b), dtype=torch.float64, device="cpu")
