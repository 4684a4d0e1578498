"""Half of a floating-point tensor's bits, from which a tensor near to it gets the whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LowBits"]


class _Layout(NamedTuple):
    """Of a floating dtype: the integers of its size, those of half its size, and 1.0 as an integer."""

    whole: torch.dtype
    half: torch.dtype
    one: int


_LAYOUTS = {
    torch.float32: _Layout(torch.int32, torch.int16, 127 << 23),
    torch.float64: _Layout(torch.int64, torch.int32, 1023 << 52),
}


class LowBits(NamedTuple):
    """What is kept of t: the lower half of the integer n(t), and the scale s, the mean of its magnitudes or more.

    n(t) is, with the sign of t, what the bits of |t|/s + 1, read as an integer, are above those of 1. It grows with t;
    one more is 2⁻²³·s where t is small, and as much as one more in the last place of t where t is large (float64:
    2⁻⁵²·s). Of the numbers with these lower bits, the one nearest to a guess is t, up to one rounding of |t| + s, if
    the guess is off by less than 2⁻⁹·(|t| + s) (float64: 2⁻²²).
    """

    bits: Tensor
    scale: Tensor

    @classmethod
    def of(cls, t: Tensor, scale: Tensor | None = None) -> LowBits:
        """Those of a float32 or float64 tensor; the scale is at least the one given, 0-dim."""
        mean = t.abs().nan_to_num_(0.0, 0.0, 0.0).mean().clamp_min_(torch.finfo(t.dtype).tiny)
        scale = mean if scale is None else torch.maximum(mean, scale)
        return cls(_number(t, scale).to(_LAYOUTS[t.dtype].half), scale)

    def nearest_to(self, guess: Tensor) -> Tensor:
        """The tensor that these are of, from one near to it; where that is not finite it stays as it is."""
        layout = _LAYOUTS[guess.dtype]
        n = _number(guess, self.scale)
        n += self.bits - n.to(layout.half)  # modulo the size of the half, the one next to zero
        found = n.abs().add_(layout.one).view(guess.dtype).sub_(1).mul_(self.scale)
        found = torch.where(n < 0, -found, found)
        return torch.where(guess.isfinite(), found, guess)


def _number(t: Tensor, scale: Tensor) -> Tensor:
    layout = _LAYOUTS[t.dtype]
    n = (t.abs() / scale).add_(1).view(layout.whole).sub_(layout.one)
    return torch.where(t < 0, -n, n)
