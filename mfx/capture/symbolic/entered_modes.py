"""Modes that a model enters while it runs: a symbolic trace records what it computes in them, but not the modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mfx import compat


class Modes:
    """Whether what is computed in the course of a trace is computed in a mode of the model's own.

    Whether such a mode makes a difference depends on who calls the model: ``autocast(enabled=False)`` does nothing but
    under autocast. So what counts is that it is entered, and not only whether something is another than it was.
    """

    def __init__(self) -> None:
        self._entered: list[str] = []
        self._before = compat.modes()

    def check(self) -> None:
        """To be called wherever something is computed.

        Raises:
            RuntimeError: a mode is on that was not when the trace began.
        """
        if self._entered:
            raise RuntimeError(f"a part of it is computed in {self._entered[-1]}, which a trace does not record")
        if compat.modes() != self._before:
            raise RuntimeError("a part of it is computed in another mode (gradients, autocast, kernels of attention)")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the modes that are entered in the course of the block."""
        with compat.modes_observed(self._entered.append, self._entered.pop, _refuse_seeds):
            yield


def _refuse_seeds() -> None:
    raise RuntimeError("it sets the state of the random generator, which a trace does not record")
