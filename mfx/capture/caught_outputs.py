"""Catches what a thread prints, logs and writes to the standard streams, by whatever way it does so."""

from __future__ import annotations

import builtins
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from mfx import compat

STREAMS = ("stdout", "stderr", "__stdout__", "__stderr__")  # of sys

_NOT_SAID = ("warnings", "logging", "torch", "mfx")  # packages whose own texts these are, or that were caught before

Write = Callable[[str, Any, Callable[[], Any]], object]


@contextmanager
def outputs_caught(printed: Callable[..., object], logged: Callable[..., object], written: Write) -> Iterator[None]:
    """Within this context, catch what this thread says; nothing is said.

    Args:
        printed: called in place of ``print``.
        logged: called in place of ``logging.Logger.handle``.
        written: called for what is written in another way, with the name of the stream in `sys`, a text or bytes, and a
            function that writes it.
    """
    with ExitStack() as stack:
        stack.enter_context(compat.patched(builtins, "print", printed))
        stack.enter_context(compat.patched(logging.Logger, "handle", logged))
        streams = {id(stream): (name, stream) for name in reversed(STREAMS) if (stream := getattr(sys, name))}
        for name, stream in streams.values():
            with suppress(Exception):  # a stream of the user's, which may be closed
                stream.flush()
            for owner in filter(None, (stream, getattr(stream, "buffer", None))):
                with suppress(AttributeError, TypeError):  # an object whose methods cannot be replaced
                    write = partial(_write, written, name, owner.write, stream.flush)
                    stack.enter_context(compat.patched(owner, "write", write))
        stack.enter_context(compat.patched(os, "write", partial(_write_to_file, written, os.write)))
        yield


def _write(written: Write, name: str, write: Callable[[Any], Any], flush: Callable[[], object], data: Any) -> Any:
    if _is_said():
        written(name, data, partial(write, data))
        return len(data)
    count = write(data)
    flush()  # else the text is written to the buffer later, by whoever flushes it
    return count


def _write_to_file(written: Write, write: Callable[[int, Any], int], file: int, data: Any) -> int:
    if file not in (1, 2) or not _is_said():
        return write(file, data)
    written(STREAMS[file - 1], data, partial(write, file, data))
    return len(data)


def _is_said() -> bool:
    """True if it is the model that writes, or a library that it calls."""
    frame = sys._getframe(1)
    own = frame.f_globals["__name__"]
    while frame.f_back is not None and frame.f_globals.get("__name__") in (own, compat.patched.__module__):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] not in _NOT_SAID
