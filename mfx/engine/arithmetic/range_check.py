"""A check for what fixed point cannot hold: values that are not finite, and values out of range."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfx.engine.arithmetic.signed import UpdateGamma

# int64 with 40 fraction bits holds ±2²³. Held to half of that, x + v cannot wrap around unseen: |v| stays below 2²²
# with the branch's values, of which it is an average (below 2²³ for a map, and then a wrapped sum lands outside ±2²²).
#
# With signs of γ it is no average: |v'| ≤ a·|v| + (1+a)·|f|, a = |γ|, and so |v| ≤ (1+a)/(1−a)·max|f| at worst. So v is
# held to ±2²², too. From |v| < 2²² a step leads to less than (a + (1+a))·2²² < 3·2²² by a residual; by a map, where
# |f| < 2²³ and a < 1/3, to less than (a + 2·(1+a))·2²² < 3·2²². A sum that wraps is 4·2²² off: it lands outside ±2²².
# (Before that (1+a)·f of a map may be 2²³ or more, which is no int64. Whatever a device makes of it is at one end of
# the range, and γ·v, less than 2²²/3, does not lead from there to ±2²².)
LIMIT = 2.0**22


class RangeCheck:
    """The elements of a chain's state that are out of range: they are NaN whenever the stream is read.

    On a CPU the common case, nothing wrong, costs one pass over a branch's values that finds the extremes: x needs no
    look while they bound it. On other devices that would mean waiting for the device, so the masks are always formed.

    Attributes:
        poisoned: a mask of the elements; None if there are none.
    """

    def __init__(self) -> None:
        self.poisoned: Tensor | None = None
        self._admitted = 0.0  # the largest magnitude admitted so far; infinite where unknown, as the bounds below
        self._x: float | None = None  # no magnitude of x is larger; None before the first step
        self._v = 0.0
        self._peak: Tensor | None = None  # the largest finite magnitude, on the device

    @property
    def overflowed(self) -> Tensor | None:
        """The largest finite magnitude if it was too large, else 0, as a 0-dim tensor; None if all were in range.

        Computed without waiting for the device.
        """
        return None if self._peak is None else self._peak * (self._peak >= LIMIT)

    def admit(self, y: Tensor) -> Tensor:
        """Return ``y`` with zeros for what fixed point cannot hold, and remember these elements."""
        extent = _extent(y)
        self._admitted = max(self._admitted, extent)
        if extent < LIMIT:
            return y
        size = y.abs()
        bad = (size < LIMIT).logical_not_()
        self._remember(bad, size.nan_to_num_(nan=0.0, posinf=0.0).amax().to(torch.float64))
        return y.masked_fill(bad, 0)

    def check(self, X: Tensor, V: Tensor, kind: str, gamma: UpdateGamma) -> None:
        """Remember the elements at which the fixed-point ``X`` or ``V`` left the range in a step of this kind."""
        if self._is_bounded(kind, gamma):
            return
        if not gamma.averages:
            self._check_v(V)
        self._x = _extent(X) / 2.0**40
        if not self._x < LIMIT:
            size = X.abs()
            self._remember(size >= int(LIMIT) << 40, size.amax().to(torch.float64) / 2.0**40)

    def _check_v(self, V: Tensor) -> None:
        self._v = _extent(V) / 2.0**40
        if not self._v < LIMIT:
            limit = int(LIMIT) << 40
            bad = (limit <= V) | (-limit >= V)  # not by V.abs(), for −2⁶³ has none
            self._remember(bad, V.to(torch.float64).abs().amax() / 2.0**40)

    def clean(self, y: Tensor) -> Tensor:
        """Return what ``admit`` returned for this ``y``; remember nothing."""
        if _extent(y) < LIMIT:
            return y
        return y.masked_fill((y.abs() < LIMIT).logical_not_(), 0)

    def poison(self, x: Tensor) -> Tensor:
        """Set the poisoned elements of ``x`` to NaN, in place."""
        return x if self.poisoned is None else x.masked_fill_(self.poisoned, torch.nan)

    def _is_bounded(self, kind: str, gamma: UpdateGamma) -> bool:
        """True if a step that adds admitted values cannot have led out of range.

        V is an average of f, which is the branch's value, less x in a map; or, with signs of γ, at most
        |γ|·|v| + (1+|γ|)·|f|. What that leaves out are roundings: v is off by at most (2n + 1)·2⁻⁴⁰/(1 − |γ|) < 2⁻¹⁰,
        and x by that times the number of steps: far less than half the range.
        """
        if self._x is None:
            self._x = self._v = self._admitted
        f = self._admitted + (self._x if kind == "map" else 0.0)
        self._v = gamma.largest(self._v, f)
        self._x += self._v
        return self._x < LIMIT / 2 and self._v < LIMIT / 2

    def _remember(self, bad: Tensor, peak: Tensor) -> None:
        self.poisoned = bad if self.poisoned is None else self.poisoned | bad
        self._peak = peak if self._peak is None else torch.maximum(self._peak, peak)


def _extent(t: Tensor) -> float:
    """Return the largest magnitude; infinity if there is a NaN, or if that would mean waiting for a device."""
    if t.numel() == 0:
        return 0.0
    if t.device.type != "cpu":
        return math.inf
    low, high = torch.aminmax(t)
    extent = float(max(-low.item(), high.item()))
    return math.inf if math.isnan(extent) else extent
