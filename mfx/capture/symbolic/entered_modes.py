"""Detect modes (grad, autocast, …) that a model enters while it is traced: a symbolic trace does not record them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mfx import compat
from mfx.capture.symbolic.refusals import Refusals, UntraceableError


class EnteredModes:
    """Detects modes that the model enters in the course of a trace.

    A mode may make a difference for some callers only: ``autocast(enabled=False)`` does nothing but under autocast. So
    entering it counts, also where it changes nothing.
    """

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._entered: list[str] = []
        self._before = compat.modes()

    def check(self) -> None:
        """Check that no mode of the model's own is on; to be called for every node.

        Raises:
            UntraceableError: a mode is on that was not when the trace began.
        """
        if self._entered:
            self._refuse(f"a part of it is computed in {self._entered[-1]}, which a trace does not record")
        if compat.modes() != self._before:
            self._refuse("a part of it is computed in another mode (gradients, autocast, kernels of attention)")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this context, notice the modes that are entered."""
        with (
            compat.modes_observed(self._entered.append, self._entered.pop, self._refuse_seeds),
            compat.differentiation_observed(self.refuse_differentiation),
        ):
            yield

    def refuse_differentiation(self, what: str) -> None:
        """Refuse that the model differentiates, but by `torch.autograd.grad`, which is an operation like others."""
        self._refuse(f"it {what}, which a trace does not record")

    def _refuse_seeds(self) -> None:
        self._refuse("it sets the state of the random generator, which a trace does not record")

    def _refuse(self, what: str) -> NoReturn:
        self._refusals.refuse(UntraceableError(what))
