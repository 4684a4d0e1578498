"""Prints, logs, warnings and looks at the clock of a model, as nodes of its graph.

They say it once in each call: not in a recomputation, nor in a call that is undone, nor on tensors without data.
"""

from __future__ import annotations

import builtins
import logging
import pkgutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.modules.recomputing import RUNNING
from mfx_passes.rewrite.fold import stays_in_graph


class _Held(threading.local):
    outputs: list[Callable[[], None]] | None = None


_held = _Held()


@contextmanager
def outputs_held() -> Iterator[Callable[[], None]]:
    """Hold what this thread's graphs print and log in this context, and say it at its end.

    Yields:
        Drops what was said so far, for a call that is undone.
    """
    before, outputs = _held.outputs, list[Callable[[], None]]()
    _held.outputs = outputs
    try:
        yield outputs.clear
    finally:
        _held.outputs = before
        for output in outputs:
            _say(output)


@stays_in_graph
def print_values(*values: Any, file: str | None = None, **options: Any) -> None:
    """Print values, as a node of a graph; ``file`` is the name of a stream of `sys`."""
    if _is_silent(values):
        return
    if _held.outputs is not None:
        values = tuple(map(str, values))  # they may be changed in place later
    _say(partial(builtins.print, *values, file=file and getattr(sys, file), **options))


@stays_in_graph
def log_values(name: str, level: int, file: str, line: int, function: str, message: Any, *values: Any) -> None:
    """Log a message with values in it, as a node of a graph."""
    logger = logging.getLogger(name)
    if _is_silent((message, values)) or not logger.isEnabledFor(level):
        return
    record = logger.makeRecord(name, level, file, line, message, values, None, function)
    if _held.outputs is not None:
        record.msg, record.args = record.getMessage(), ()
    _say(partial(logger.handle, record))


@stays_in_graph
def warn_values(message: Any, category: str, file: str, line: int, module: str) -> None:
    """Warn, as a node of a graph, as code at a line of a module would; ``category`` is the class by its full name."""
    if _is_silent(message):
        return
    registry = vars(sys.modules[module]).setdefault("__warningregistry__", {}) if module in sys.modules else None
    cls = pkgutil.resolve_name(category)
    _say(partial(warnings.warn_explicit, str(message), cls, file, line, module, registry))


@stays_in_graph
def read_clock(name: str) -> Any:
    """Read a clock, a function of `time`, as a node of a graph."""
    return getattr(time, name)()


def says_something(nodes: Iterable[fx.Node]) -> bool:
    """True if one of these nodes prints, logs or warns."""
    return any(node.target in (print_values, log_values, warn_values) for node in nodes)


def make_text(*pieces: Any) -> str:
    """Return a text made of texts and of values, each with its format or None, as a node of a graph."""
    if any(map(compat.is_fake, pytree.tree_leaves(pieces))):
        return ""  # the format of a number needs the value
    return "".join(piece if isinstance(piece, str) else _formatted(*piece) for piece in pieces)


def _formatted(value: Any, form: str | None) -> str:
    return str(value) if form is None else format(value, form)


def _is_silent(values: Any) -> bool:
    return RUNNING.again or not compat.runs_for_real() or any(map(compat.is_fake, pytree.tree_leaves(values)))


def _say(output: Callable[[], None]) -> None:
    if _held.outputs is None:
        output()
    else:
        _held.outputs.append(output)
