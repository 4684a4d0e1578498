"""How large the numbers of a chain can be, known without looking at them after every step."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Reach"]

# In units of 2⁻⁴⁰: float64 adds integers below 2⁵³ exactly, and ``floor_divide``, of v, is right below 2⁵⁰. That v is
# an average leaves out its roundings: over all steps they add up to at most (2n + 1)·2⁻⁴⁰/(1 − γ) < 1.
_LARGEST_X, _LARGEST_V = 2.0**12, 2.0**10 - 1


@dataclass(frozen=True)
class Reach:
    """Upper bounds of the magnitudes of x and v."""

    x: float
    v: float

    @property
    def is_small(self) -> bool:
        """Whether float64 holds such numbers in fixed point exactly."""
        return self.x < _LARGEST_X and self.v < _LARGEST_V

    def after_step(self, y: float, kind: str) -> Reach:
        """The bounds after a step whose branch gave at most ``y``: v is an average of f, which is y, or y − x."""
        v = max(self.v, y + self.x if kind == "map" else y)
        return Reach(self.x + v, v)
