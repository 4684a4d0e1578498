"""The largest number that fits, in few trials: every trial is a rehearsal of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

MOST = 2**24  # nobody asks for more


def largest(bytes_at: Callable[[int], float], limit: float, known: int, *, step: int = 1) -> int:
    """Return the largest multiple of ``step`` that takes no more than ``limit`` bytes; 0 if there is none.

    Bytes grow with the number. A line through the two nearest numbers that were tried says where they reach the limit,
    and what it says is tried: the result was found to fit, and the next multiple not to.

    Args:
        bytes_at: returns the bytes that a number takes; infinity if the model does not take that number.
        limit: bytes.
        known: the number to try first.
        step: the numbers tried are its multiples.
    """
    tried: dict[int, float] = {}
    low, high = 0, MOST // step + 1  # fits; does not
    guess = max(1, known // step)
    while high - low > 1:
        tried[guess] = bytes_at(guess * step)
        low, high = (guess, high) if tried[guess] <= limit else (low, guess)
        reached = _on_a_line(tried, limit, low)
        if reached is None or reached >= high:
            reached = (low + high) // 2 if high in tried else 2 * low
        guess = min(max(reached, low + 1), high - 1)
    return low * step


def _on_a_line(tried: Mapping[int, float], limit: float, low: int) -> int | None:
    """Return the number at which a line reaches the limit; None if there is no line that rises."""
    near = sorted((number for number, size in tried.items() if math.isfinite(size)), key=lambda n: abs(n - low))[:2]
    if len(near) < 2:
        return None
    a, b = near
    slope = (tried[b] - tried[a]) / (b - a)
    return int(a + (limit - tried[a]) / slope) if slope > 0 else None
