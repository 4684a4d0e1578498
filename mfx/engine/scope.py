"""The chain around the running code, per thread: recorded or not, kept or recomputed, measured or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mfx.compat import set_grad_enabled
from mfx.engine.memory.measure import StepMeasure
from mfx.modules.recomputing import RUNNING


class _Scope(threading.local):
    recorded: bool | None = None  # None: no chain around
    keeps: bool | None = False  # whether activations are kept, if there is a chain around; None: it does not say
    measure: StepMeasure | None = None


_scope = _Scope()


def enclosing_is_recorded() -> bool | None:
    """True if the outermost chain around the caller runs for a backward pass; None if there is no chain around."""
    return _scope.recorded


def enclosing_keeps() -> bool | None:
    """True if the step around the caller keeps its activations; None if no chain around says so or not."""
    return None if _scope.recorded is None else _scope.keeps


def measure() -> StepMeasure | None:
    """Return the measure that counts the tensors autograd saves now; None if nothing is measured."""
    return _scope.measure


@contextmanager
def inside_chain(recorded: bool, *, keeps: bool) -> Iterator[None]:
    """Run the body as part of a chain that is (not) recorded: nested chains must decide the same way."""
    before = _scope.recorded, _scope.keeps
    _scope.recorded, _scope.keeps = recorded, keeps
    try:
        yield
    finally:
        _scope.recorded, _scope.keeps = before


@contextmanager
def inside_step(*, keeps: bool | None) -> Iterator[None]:
    """Run the body as part of a step that keeps its activations; None: chains inside it decide by themselves."""
    before, _scope.keeps = _scope.keeps, keeps
    try:
        yield
    finally:
        _scope.keeps = before


class inside_recomputation:  # noqa: N801
    """Run the body as a recomputation in a recorded chain, with gradients."""

    __slots__ = ("_before", "_has_gradients")

    def __enter__(self) -> None:
        self._before = _scope.recorded, _scope.keeps, RUNNING.again
        _scope.recorded, _scope.keeps, RUNNING.again = True, False, True
        self._has_gradients = torch.is_grad_enabled()
        set_grad_enabled(True)

    def __exit__(self, *raised: object) -> None:
        set_grad_enabled(self._has_gradients)
        _scope.recorded, _scope.keeps, RUNNING.again = self._before


@contextmanager
def measured_by(step: StepMeasure) -> Iterator[None]:
    """Run the body measured by ``step``, chains inside it included."""
    before, _scope.measure = _scope.measure, step
    try:
        with step:
            yield
    finally:
        _scope.measure = before
