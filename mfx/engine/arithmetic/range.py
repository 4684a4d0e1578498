"""What fixed point cannot hold: values that are not finite, and values out of range."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LIMIT", "Guard"]

# int64 with 40 fraction bits holds ±2²³. Held to half of that, x + v cannot wrap around unseen: |v| stays below 2²²
# with the branch's values, of which it is an average (below 2²³ for a map, and then a wrapped sum lands outside ±2²²).
LIMIT = 2.0**22


class Guard:
    """Remembers which elements are poisoned, and makes them NaN whenever the stream is read.

    On a CPU the common case, nothing wrong, costs one pass that finds the extremes. Elsewhere that would mean waiting
    for the device, so the masks are always formed.
    """

    def __init__(self) -> None:
        self.poison: Tensor | None = None
        self.overflowed: Tensor | None = None

    def admit(self, y: Tensor) -> Tensor:
        """``y`` with what fixed point cannot hold set to zero and remembered."""
        if _waits_for_nothing(y) and _inside(y, LIMIT):
            return y
        bad = (y.abs() < LIMIT).logical_not_()
        self._remember(bad, bad & y.isfinite())
        return y.masked_fill(bad, 0)

    def check(self, X: Tensor) -> None:
        """Remember where the fixed-point ``X`` left the range."""
        limit = int(LIMIT) << 40
        if not (_waits_for_nothing(X) and _inside(X, limit)):
            bad = X.abs() >= limit
            self._remember(bad, bad)

    def clean(self, y: Tensor) -> Tensor:
        """What ``admit`` gave for this ``y``; nothing is remembered."""
        if _waits_for_nothing(y) and _inside(y, LIMIT):
            return y
        return y.masked_fill((y.abs() < LIMIT).logical_not_(), 0)

    def mark(self, x: Tensor) -> Tensor:
        """Make the poisoned elements of ``x`` NaN, in place."""
        return x if self.poison is None else x.masked_fill_(self.poison, torch.nan)

    def _remember(self, bad: Tensor, overflowed: Tensor) -> None:
        self.poison = bad if self.poison is None else self.poison | bad
        now = overflowed.any()
        self.overflowed = now if self.overflowed is None else self.overflowed | now


def _waits_for_nothing(t: Tensor) -> bool:
    return t.device.type == "cpu"


def _inside(t: Tensor, limit: float) -> bool:
    if t.numel() == 0:
        return True
    low, high = torch.aminmax(t)
    return bool(-limit < low.item() and high.item() < limit)
