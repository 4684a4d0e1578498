"""Code that a second run of a step is not ended in the midst of, for it has something to put right at its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Depth(threading.local):
    value = 0


_DEPTH = _Depth()


@contextmanager
def must_finish() -> Iterator[None]:
    """What runs in the block runs to its end, in second runs too."""
    _DEPTH.value += 1
    try:
        yield
    finally:
        _DEPTH.value -= 1


def may_be_ended() -> bool:
    """Whether what runs now may be left by an exception."""
    return not _DEPTH.value
