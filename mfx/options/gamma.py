"""The momentum coefficient, as a fraction of small integers."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from fractions import Fraction

from mfx_passes.errors import MfxError

_TOLERANCE = Fraction(1, 10**6)
_LARGEST_DENOMINATOR = 2**14


@dataclass(frozen=True)
class Gamma:
    """γ = ``numerator`` / ``denominator`` in [0, 1], the same in every mode; 1 only for a `mfx.MomentumNet`.

    >>> Gamma.of(0.9)
    Gamma(numerator=9, denominator=10)
    """

    numerator: int
    denominator: int

    @classmethod
    def of(cls, value: float, *, or_one: bool = False) -> Gamma:
        """Return the fraction that ``value`` is, else the simplest within 1e-6 of it; denominators go up to 2**14.

        Args:
            value: γ.
            or_one: allow γ = 1, at which the velocity stays what it was before the first step.

        Raises:
            MfxError: ``value`` is not a real number in [0, 1), or too close to 0 or 1 to be told from it.
        """
        given: object = value
        is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
        if is_number and or_one and value == 1:
            return cls(1, 1)
        if not is_number or not 0 <= float(value) < 1:
            why = ": no branch would count, and without a velocity to start from, x would stay as it is"
            why = why if is_number and value == 1 else ""
            raise MfxError(f"gamma must be a real number with 0 <= gamma < 1, not {value!r}{why}")
        exact = Fraction(float(value))
        if exact == 0:
            return cls(0, 1)
        nearest = exact.limit_denominator(_LARGEST_DENOMINATOR)
        if float(nearest) == float(value):  # 9999/10000, and not 9900/9901, which is within 1e-6 too
            return cls(nearest.numerator, nearest.denominator)
        fraction = _simplest_between(max(exact - _TOLERANCE, Fraction(0)), exact + _TOLERANCE)
        if fraction.denominator > _LARGEST_DENOMINATOR:
            fraction = nearest
        if not 0 < fraction < 1:
            steps = 1 if fraction == 0 else _LARGEST_DENOMINATOR - 1
            raise MfxError(
                f"gamma = {value!r} cannot be told from {int(fraction)}; the nearest gamma that works is "
                f"{steps}/{_LARGEST_DENOMINATOR} = {steps / _LARGEST_DENOMINATOR!r}"
            )
        return cls(fraction.numerator, fraction.denominator)

    @property
    def value(self) -> float:
        """γ as a Python float."""
        return self.numerator / self.denominator

    @property
    def complement(self) -> float:
        """1 − γ, rounded once."""
        return (self.denominator - self.numerator) / self.denominator

    @property
    def is_zero(self) -> bool:
        """True if γ is 0, where a chain computes what the original model does."""
        return self.numerator == 0


def _simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """Return the fraction with the smallest denominator in [low, high], by descending the Stern–Brocot tree."""
    whole = math.floor(low)
    if whole == low:
        return Fraction(whole)
    if whole + 1 <= high:
        return Fraction(whole + 1)
    return whole + 1 / _simplest_between(1 / (high - whole), 1 / (low - whole))
