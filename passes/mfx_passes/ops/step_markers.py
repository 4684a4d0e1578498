"""Functions that a graph calls to say that a step of a chain starts or ends here; see `whole_steps`."""

from __future__ import annotations

from typing import Any


def called(x: Any, y: Any, module: str) -> Any:
    """``y`` itself: a module was called on ``x`` and gave it."""
    return y


def started(x: Any) -> Any:
    """``x`` itself: a chain of marked steps starts here."""
    return x


def mapped(x: Any, h: Any) -> Any:
    """``h`` itself: a step leads from ``x`` to it."""
    return h


def added(x: Any, f: Any) -> Any:
    """The end of a step that adds ``f`` to ``x``."""
    return x + f
