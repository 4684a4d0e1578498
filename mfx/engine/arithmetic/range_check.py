"""A check for what fixed point cannot hold: values that are not finite, and values out of range."""

from __future__ import annotations

import torch
from torch import Tensor

# int64 with 40 fraction bits holds ±2²³. Held to half of that, x + v cannot wrap around unseen: |v| stays below 2²²
# with the branch's values, of which it is an average (below 2²³ for a map, and then a wrapped sum lands outside ±2²²).
LIMIT = 2.0**22


class RangeCheck:
    """The elements of a chain's state that are out of range: they are NaN whenever the stream is read.

    On a CPU the common case, nothing wrong, costs one pass that finds the extremes. On other devices that would mean
    waiting for the device, so the masks are always formed.

    Attributes:
        poisoned: a mask of the elements; None if there are none.
    """

    def __init__(self) -> None:
        self.poisoned: Tensor | None = None
        self._peak: Tensor | None = None  # the largest finite magnitude, on the device

    @property
    def overflowed(self) -> Tensor | None:
        """The largest finite magnitude if it was too large, else 0, as a 0-dim tensor; None if all were in range.

        Computed without waiting for the device.
        """
        return None if self._peak is None else self._peak * (self._peak >= LIMIT)

    def admit(self, y: Tensor) -> Tensor:
        """Return ``y`` with zeros for what fixed point cannot hold, and remember these elements."""
        if self._inside(y, 1.0):
            return y
        size = y.abs()
        bad = (size < LIMIT).logical_not_()
        self._remember(bad, size.nan_to_num_(nan=0.0, posinf=0.0).amax().to(torch.float64))
        return y.masked_fill(bad, 0)

    def check(self, X: Tensor) -> None:
        """Remember the elements at which the fixed-point ``X`` left the range."""
        if not self._inside(X, 2.0**40):
            size = X.abs()
            self._remember(size >= int(LIMIT) << 40, size.amax().to(torch.float64) / 2.0**40)

    def clean(self, y: Tensor) -> Tensor:
        """Return what ``admit`` returned for this ``y``; remember nothing."""
        if self._inside(y, 1.0):
            return y
        return y.masked_fill((y.abs() < LIMIT).logical_not_(), 0)

    def poison(self, x: Tensor) -> Tensor:
        """Set the poisoned elements of ``x`` to NaN, in place."""
        return x if self.poisoned is None else x.masked_fill_(self.poisoned, torch.nan)

    def _inside(self, t: Tensor, one: float) -> bool:
        """True if all of ``t``, in which 1.0 is ``one``, is known to be in range."""
        if t.numel() == 0:
            return True
        if t.device.type != "cpu":
            return False
        low, high = torch.aminmax(t)
        return max(-low.item(), high.item()) < LIMIT * one  # False for NaN

    def _remember(self, bad: Tensor, peak: Tensor) -> None:
        self.poisoned = bad if self.poisoned is None else self.poisoned | bad
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)
