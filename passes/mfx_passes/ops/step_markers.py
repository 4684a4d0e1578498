"""Functions whose calls mark in a graph where a step of a chain starts or ends; see `named_steps`."""

from __future__ import annotations

from typing import Any


def called(x: Any, y: Any, module: str) -> Any:
    """Return ``y``: the result of a call of a module on ``x``."""
    return y


def started(x: Any) -> Any:
    """Return ``x``: a chain of marked steps starts here."""
    return x


def mapped(x: Any, h: Any) -> Any:
    """Return ``h``: a step leads from ``x`` to it."""
    return h


def added(x: Any, f: Any) -> Any:
    """Return ``x + f``: the end of a step that adds ``f`` to ``x``."""
    return x + f
