"""Errors where a model's Python code asks for what a trace does not know: the model cannot catch one unseen."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from mfx.capture.caught_outputs import outputs_caught


class UntraceableError(BaseException):
    """The model asks for something that a trace does not know.

    It is no Exception, so that the model's own ``except Exception`` does not catch it, and goes on.

    Attributes:
        stack: where it was raised, if the model has caught it nevertheless.
    """

    stack: traceback.StackSummary | None = None


class OutputError(UntraceableError):
    """The model prints, logs or formats a traced value: an effect that has to take place once in each call."""


class WrongGuessError(UntraceableError):
    """The model raises an error on a path that the trace has guessed."""


DECISION = "a decision (control flow) depends on the value of a tensor"


class Refusals:
    """The errors that were raised in one trace because it does not know what the model asks for.

    A model that catches one (``except:``, ``finally: return``, a default) would be traced down the path for errors. So
    they are remembered.
    """

    def __init__(self) -> None:
        self._made: list[tuple[UntraceableError, traceback.StackSummary, tuple[int, int]]] = []

    def refuse(self, error: UntraceableError) -> NoReturn:
        """Raise an error, and remember it."""
        frame = _user_frame(sys._getframe(1))
        self._made.append((error, traceback.extract_stack(frame), _instruction(frame)))
        try:
            raise error
        finally:
            del error, frame  # or they refer to each other

    def forget_probe(self) -> None:
        """Forget the last error if the instruction that met it goes on: torch probes an argument before it calls back.

        To be called as a node is made. ``torch.zeros(size)`` asks if the size is an integer, then records the call.
        """
        if not self._made:
            return
        if _instruction(_user_frame(sys._getframe(1))) == self._made[-1][2]:
            del self._made[-1]

    @property
    def count(self) -> int:
        """The number of errors so far."""
        return len(self._made)

    def forget_after(self, count: int) -> None:
        """Forget all errors but the first ``count``: what met them is not part of the trace any more."""
        del self._made[count:]

    def check(self, first: int = 0) -> None:
        """Check that no error was raised that the model has caught, after the ``first`` ones.

        Raises:
            UntraceableError: one was.
        """
        for error, stack, _ in self._made[first:]:
            error.stack = stack
            raise error.with_traceback(None)


@contextmanager
def outputs_refused() -> Iterator[None]:
    """Within this context, refuse what this thread prints, logs and writes to the standard streams."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OutputError("it prints or logs in code that runs again in the backward pass")

    with outputs_caught(refuse, refuse, refuse):
        yield


def _user_frame(frame: FrameType) -> FrameType:
    while frame.f_globals.get("__name__", "").startswith(("mfx.", "torch.fx", "torch.overrides")) and frame.f_back:
        frame = frame.f_back
    return frame


def _instruction(frame: FrameType) -> tuple[int, int]:
    return id(frame), frame.f_lasti
