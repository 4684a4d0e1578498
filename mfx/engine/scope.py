"""What code inside a branch may know about the chain around it, per thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["enclosing_is_recorded", "inside_chain", "inside_recomputation", "recomputing"]


class _Scope(threading.local):
    recorded: bool | None = None  # None: no chain around
    recomputing = False


_scope = _Scope()


def recomputing() -> bool:
    """Whether the calling code runs a second time, to rebuild activations in the backward pass.

    Forward hooks fire in both runs; those that count or log can ask here.
    """
    return _scope.recomputing


def enclosing_is_recorded() -> bool | None:
    """Whether the outermost chain around the caller runs for a backward pass; None if there is no chain around."""
    return _scope.recorded


@contextmanager
def inside_chain(recorded: bool) -> Iterator[None]:
    """Everything inside belongs to a chain that was (not) recorded: nested chains must decide the same way."""
    before, _scope.recorded = _scope.recorded, recorded
    try:
        yield
    finally:
        _scope.recorded = before


@contextmanager
def inside_recomputation() -> Iterator[None]:
    """Everything inside is a second run, of a recorded chain."""
    before = _scope.recorded, _scope.recomputing
    _scope.recorded, _scope.recomputing = True, True
    try:
        yield
    finally:
        _scope.recorded, _scope.recomputing = before
