"""Tells code in a branch if it runs for the first time, or again in the backward pass."""

from __future__ import annotations

import threading


class _Running(threading.local):
    again = False


RUNNING = _Running()


def recomputing() -> bool:
    """True if the calling code runs as a recomputation, which rebuilds activations in the backward pass.

    Forward hooks fire in the forward pass and in recomputations; hooks that count or log can tell them apart by this.
    """
    return RUNNING.again
