"""Marks code that recomputation must not stop early, because it has cleanup to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Depth(threading.local):
    value = 0


_DEPTH = _Depth()


@contextmanager
def must_finish() -> Iterator[None]:
    """Let the code in the block run to its end in recomputation, too."""
    _DEPTH.value += 1
    try:
        yield
    finally:
        _DEPTH.value -= 1


def may_stop() -> bool:
    """True if recomputation may stop what runs now, by an exception."""
    return not _DEPTH.value
