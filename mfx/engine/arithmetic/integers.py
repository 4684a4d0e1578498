"""Integers by way of float64: a CPU converts and divides those eight at a time, and int64 one by one.

Up to ``SMALL`` both ways give the same integers, so which one is taken changes nothing but the time.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

__all__ = ["SMALL", "floor_divide", "nearest"]

SMALL = 2**51

# In [2⁵², 2⁵³) neighbouring float64 numbers are 1 apart and so are their bits: adding 1.5·2⁵² rounds to the nearest
# integer (ties to even, as torch.round does), and what the bits then are beyond those of 1.5·2⁵² is that integer.
_SHIFT = 1.5 * 2.0**52
(_SHIFT_BITS,) = struct.unpack("<q", struct.pack("<d", _SHIFT))


def nearest(t: Tensor, *, small: bool) -> Tensor:
    """The nearest int64 to float64 ``t``, written over it: element for element, in the same eight bytes.

    Args:
        t: numbers below 2⁶³ in magnitude.
        small: whether they are known to be below ``SMALL``.
    """
    if small:
        return t.add_(_SHIFT).view(torch.int64).sub_(_SHIFT_BITS)
    return t.view(torch.int64).copy_(t.round_())


def floor_divide(a: Tensor, b: int, *, small: bool, out: Tensor | None = None) -> Tensor:
    """⌊a/b⌋ for int64 ``a``, 0 < b ≤ 2¹⁴.

    The float64 quotient of |a| < 2⁵¹ is within |a/b|·2⁻⁵³ < 1/(4b) of the real one, which is an integer or at least 1/b
    below the next one: rounding does not carry it over.

    Args:
        a: integers; left as they are.
        b: the divisor.
        small: whether ``a`` is known to be below ``SMALL`` in magnitude.
        out: where to write, not ``a`` itself.
    """
    if not small:
        return torch.div(a, b, rounding_mode="floor", out=out)
    out = torch.empty_like(a) if out is None else out
    return nearest(out.view(torch.float64).copy_(a).div_(b).floor_(), small=True)
