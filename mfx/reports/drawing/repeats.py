"""The repeats in a sequence: ``a b a b a b c`` is three times ``a b``, then ``c``."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

_LONGEST = 12  # labels in one period


def repeats(labels: Sequence[Hashable]) -> Iterator[tuple[int, int, int]]:
    """Split a sequence into runs of equal periods, from left to right, each as long as possible.

    Args:
        labels: equal for elements that look the same.

    Yields:
        ``(start, period, count)``: the same ``period`` labels ``count`` times, from ``start`` on.

    >>> list(repeats("abababc"))
    [(0, 2, 3), (6, 1, 1)]
    >>> list(repeats("aaaa"))
    [(0, 1, 4)]
    """
    start = 0
    while start < len(labels):
        longest = min(_LONGEST, (len(labels) - start) // 2)
        counts = {period: _count(labels, start, period) for period in range(1, longest + 1)}
        repeated = {period: count for period, count in counts.items() if count > 1}
        period = max(repeated, key=lambda period: (period * repeated[period], -period), default=1)
        count = repeated.get(period, 1)
        yield start, period, count
        start += period * count


def _count(labels: Sequence[Hashable], start: int, period: int) -> int:
    first = labels[start : start + period]
    count = 1
    while labels[start + count * period : start + (count + 1) * period] == first:
        count += 1
    return count
