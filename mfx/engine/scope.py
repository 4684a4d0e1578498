"""What code inside a branch may know about the chain around it, per thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mfx.engine.memory.measure import StepMeasure


class _Scope(threading.local):
    recorded: bool | None = None  # None: no chain around
    keeps = False  # with a chain around: whether activations are kept
    recomputing = False
    measure: StepMeasure | None = None


_scope = _Scope()


def recomputing() -> bool:
    """Whether the calling code runs a second time, to rebuild activations in the backward pass.

    Forward hooks fire in both runs; those that count or log can ask here.
    """
    return _scope.recomputing


def enclosing_is_recorded() -> bool | None:
    """Whether the outermost chain around the caller runs for a backward pass; None if there is no chain around."""
    return _scope.recorded


def enclosing_keeps() -> bool | None:
    """Whether the step around the caller keeps its activations; None if there is no chain around."""
    return None if _scope.recorded is None else _scope.keeps


def measure() -> StepMeasure | None:
    """What is to be told of every tensor that is packed away, if anything."""
    return _scope.measure


@contextmanager
def inside_chain(recorded: bool, *, keeps: bool) -> Iterator[None]:
    """Everything inside belongs to a chain that was (not) recorded: nested chains must decide the same way."""
    before = _scope.recorded, _scope.keeps
    _scope.recorded, _scope.keeps = recorded, keeps
    try:
        yield
    finally:
        _scope.recorded, _scope.keeps = before


@contextmanager
def inside_kept_step() -> Iterator[None]:
    """Everything inside belongs to a step that keeps its activations."""
    before, _scope.keeps = _scope.keeps, True
    try:
        yield
    finally:
        _scope.keeps = before


class inside_recomputation:  # noqa: N801
    """Everything inside is a second run, of a recorded chain."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _scope.recorded, _scope.keeps, _scope.recomputing
        _scope.recorded, _scope.keeps, _scope.recomputing = True, False, True

    def __exit__(self, *raised: object) -> None:
        _scope.recorded, _scope.keeps, _scope.recomputing = self._before


@contextmanager
def measured_by(step: StepMeasure) -> Iterator[None]:
    """Everything inside is told to ``step``, that of chains inside too."""
    before, _scope.measure = _scope.measure, step
    try:
        with step:
            yield
    finally:
        _scope.measure = before
