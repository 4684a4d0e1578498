"""The way in which a net runs in this thread, as its submodules see it when they are called."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum


class Way(Enum):
    """A way to run the forward of a net's class; a rewritten graph calls no module that has a forward of mfx's."""

    AS_WRITTEN = "as the model does, submodules too"
    PER_MODULE = "the call is not one graph, and submodules run graphs of their own"


class _UnderWay(threading.local):
    """The forward of the net that runs in this thread, and the way in which it does."""

    root: object = None
    way: Way | None = None


UNDER_WAY = _UnderWay()


@contextmanager
def under_way(root: object, way: Way) -> Iterator[None]:
    """Within this context, the net with this forward, or a module of it, runs in this way in this thread."""
    before = UNDER_WAY.root, UNDER_WAY.way
    UNDER_WAY.root, UNDER_WAY.way = root, way
    try:
        yield
    finally:
        UNDER_WAY.root, UNDER_WAY.way = before
