"""What fixed point cannot hold: values that are not finite, and values out of range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# int64 with 40 fraction bits holds ±2²³. Held to half of that, x + v cannot wrap around unseen: |v| stays below 2²²
# with the branch's values, of which it is an average (below 2²³ for a map, and then a wrapped sum lands outside ±2²²).
LIMIT = 2.0**22


class RangeCheck:
    """Remembers which elements are poisoned, and makes them NaN whenever the stream is read.

    On a CPU the common case, nothing wrong, costs one pass that finds the extremes. Elsewhere that would mean waiting
    for the device, so the masks are always formed.

    Attributes:
        largest: no value so far was larger in magnitude; infinite where nobody looked.
    """

    def __init__(self) -> None:
        self.poison: Tensor | None = None
        self.largest = 0.0
        self._peak: Tensor | None = None  # the largest finite magnitude, on the device; known where ``largest`` is not

    @property
    def overflowed(self) -> Tensor | None:
        """The largest finite magnitude that there was if it was too large, else 0, as a 0-dim tensor; None: it was not.

        Formed without waiting for the device.
        """
        return None if self._peak is None else self._peak * (self._peak >= LIMIT)

    def admit(self, y: Tensor) -> Tensor:
        """``y`` with what fixed point cannot hold set to zero and remembered."""
        if self._inside(y, 1.0):
            return y
        size = y.abs()
        bad = (size < LIMIT).logical_not_()
        self._remember(bad, size.nan_to_num_(nan=0.0, posinf=0.0).amax().to(torch.float64))
        return y.masked_fill(bad, 0)

    def check(self, X: Tensor) -> None:
        """Remember where the fixed-point ``X`` left the range."""
        if not self._inside(X, 2.0**40):
            size = X.abs()
            self._remember(size >= int(LIMIT) << 40, size.amax().to(torch.float64) / 2.0**40)

    def clean(self, y: Tensor) -> Tensor:
        """What ``admit`` gave for this ``y``; nothing is remembered."""
        if self._inside(y, 1.0):
            return y
        return y.masked_fill((y.abs() < LIMIT).logical_not_(), 0)

    def mark(self, x: Tensor) -> Tensor:
        """Make the poisoned elements of ``x`` NaN, in place."""
        return x if self.poison is None else x.masked_fill_(self.poison, torch.nan)

    def _inside(self, t: Tensor, one: float) -> bool:
        """Whether all of ``t``, in which 1.0 is ``one``, is known to be in range."""
        if t.numel() == 0:
            return True
        if t.device.type != "cpu":
            self.largest = math.inf
            return False
        low, high = torch.aminmax(t)
        largest = max(-low.item(), high.item()) / one
        if not largest < LIMIT:  # or not a number
            self.largest = math.inf
            return False
        self.largest = max(self.largest, largest)
        return True

    def _remember(self, bad: Tensor, peak: Tensor) -> None:
        self.poison = bad if self.poison is None else self.poison | bad
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)


# In units of 2⁻⁴⁰: float64 adds integers below 2⁵³ exactly, and ``floor_divide``, of v, is right below 2⁵⁰. That v is
# an average leaves out its roundings: over all steps they add up to at most (2n + 1)·2⁻⁴⁰/(1 − γ) < 1.
_LARGEST_X, _LARGEST_V = 2.0**12, 2.0**10 - 1


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of the magnitudes of x and v."""

    x: float
    v: float

    @property
    def is_small(self) -> bool:
        """Whether float64 holds such numbers in fixed point exactly."""
        return self.x < _LARGEST_X and self.v < _LARGEST_V

    def after_step(self, y: float, kind: str) -> Bounds:
        """The bounds after a step whose branch gave at most ``y``: v is an average of f, which is y, or y − x."""
        v = max(self.v, y + self.x if kind == "map" else y)
        return Bounds(self.x + v, v)
