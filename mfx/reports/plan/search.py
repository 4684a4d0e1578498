"""The largest number that fits, in few trials: every trial is a rehearsal of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

MOST = 2**24  # nobody asks for more


def largest(bytes_at: Callable[[int], float], limit: float, known: int, *, step: int = 1) -> int:
    """Return the largest multiple of ``step``, or ``known``, that takes no more than ``limit`` bytes; 0 if none does.

    Bytes grow with the number. A line through the two nearest numbers that were tried says where they reach the limit,
    and what it says is tried: the result was found to fit, and the next multiple not to.

    Args:
        bytes_at: returns the bytes that a number takes; infinity if the model does not take that number.
        limit: bytes.
        known: the number to try first, which need not be a multiple.
        step: the numbers tried are its multiples.
    """
    tried: dict[float, float] = {known / step: bytes_at(known)}  # by the number of steps
    least = known if tried[known / step] <= limit else 0
    low, high = (known // step, MOST // step + 1) if least else (0, math.ceil(known / step))  # fits; does not
    while high - low > 1:
        reached = _on_a_line(tried, limit, low)
        if reached is None or reached >= high:
            reached = 2 * low if high > MOST // step else (low + high) // 2
        guess = min(max(reached, low + 1), high - 1)
        tried[guess] = bytes_at(guess * step)
        low, high = (guess, high) if tried[guess] <= limit else (low, guess)
    return max(low * step, least)


def _on_a_line(tried: Mapping[float, float], limit: float, low: int) -> int | None:
    """Return the number at which a line reaches the limit; None if there is no line that rises."""
    near = sorted((number for number, size in tried.items() if math.isfinite(size)), key=lambda n: abs(n - low))[:2]
    if len(near) < 2:
        return None
    a, b = near
    slope = (tried[b] - tried[a]) / (b - a)
    return int(a + (limit - tried[a]) / slope) if slope > 0 else None
