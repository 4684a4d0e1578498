"""Tells code in a branch if it runs for the first time, or again: in the backward pass, or after a trial."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Running(threading.local):
    again = False  # in a recomputation
    on_trial = False  # in a call that is undone


RUNNING = _Running()


def recomputing() -> bool:
    """True if the calling code runs as a recomputation, which rebuilds activations in the backward pass.

    Also in a call on trial, by which the path of an observed call is found, and which is undone. Forward hooks fire in
    the forward pass, in recomputations and on trial; hooks that count or log can tell them apart by this.
    """
    return RUNNING.again or RUNNING.on_trial


@contextmanager
def on_trial() -> Iterator[None]:
    """Run the body as a call on trial, for this thread."""
    before, RUNNING.on_trial = RUNNING.on_trial, True
    try:
        yield
    finally:
        RUNNING.on_trial = before
