"""Records what a model that is traced says, and its looks at the clock.

Text with traced values in it becomes text of the graph.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from mfx import compat
from mfx.capture.caught_outputs import STREAMS, outputs_caught
from mfx.capture.outputs import log_values, make_text, print_values, read_clock, warn_values
from mfx.capture.symbolic.refusals import OutputError, Refusals
from mfx.modules.references import is_users

OUTPUTS = ("print", "warn", "debug", "info", "warning", "error", "critical")  # functions that take texts

_PLAIN = (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)
_CLOCKS = ("time", "perf_counter", "monotonic", "process_time", "time_ns", "perf_counter_ns", "monotonic_ns")
_BETWEEN = ("mfx.", "torch.fx", "torch.nn.modules.module")
_MARK = re.compile("\x00(\\d+)\x00")


class Outputs:
    """The prints and logs of a model in one trace.

    Args:
        tracer: the tracer.
        refusals: takes what cannot be recorded.
    """

    def __init__(self, tracer: fx.Tracer, refusals: Refusals) -> None:
        self._tracer, self._refusals = tracer, refusals
        self._formats: list[tuple[fx.Proxy, str | None]] = []
        self._said: set[int] = set()

    def text_of(self, value: fx.Proxy, form: str | None) -> str:
        """Return what stands for the text of a traced value until it is printed or logged."""
        self._formats.append((value, form))
        return f"\x00{len(self._formats) - 1}\x00"

    def check(self) -> None:
        """Check that all texts of traced values were printed or logged.

        Raises:
            UntraceableError: one was not.
        """
        count = len(self._formats)
        self._formats.clear()
        if len(self._said) < count:
            self._refuse("a traced value is written as text, which a trace would do once")

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within this context, record what this thread prints, logs and writes to the standard streams."""
        handle = lambda logger, record: self._log(logger, record)  # noqa: E731
        with ExitStack() as stack:
            stack.enter_context(outputs_caught(self._print, handle, self._write))
            stack.enter_context(compat.patched(warnings, "warn", partial(self._warn, warnings.warn)))
            for name in _CLOCKS:
                stack.enter_context(compat.patched(time, name, partial(self._look_at_clock, name, getattr(time, name))))
            yield

    def _warn(
        self, warn: Any, message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **options: Any
    ) -> None:
        frame = _caller()
        if not is_users(frame.f_globals.get("__name__")):
            warn(message, category, stacklevel + 3, source, **options)
            return
        for _ in range(stacklevel - 1):
            frame = _caller(frame.f_back or frame)
        cls = type(message) if isinstance(message, Warning) else category or UserWarning
        name = f"{cls.__module__}:{cls.__qualname__}"
        where = frame.f_code.co_filename, frame.f_lineno, str(frame.f_globals.get("__name__"))
        self._record(warn_values, (str(message), name, *where), {})

    def _look_at_clock(self, name: str, read: Any) -> Any:
        if not is_users(_caller().f_globals.get("__name__")):
            return read()
        return self._tracer.create_proxy("call_function", read_clock, (name,), {})

    def _print(self, *values: Any, file: Any = None, **options: Any) -> None:
        if file is not None:
            streams = [name for name in STREAMS if getattr(sys, name) is file]
            options["file"] = streams[0] if streams else self._refuse("it prints into a file")
        self._record(print_values, values, options)

    def _write(self, name: str, data: Any, write: Any) -> None:
        if not isinstance(data, str):
            self._refuse(f"it writes bytes to sys.{name}")
        self._record(print_values, (data,), {"file": name, "end": ""})

    def _log(self, logger: logging.Logger, record: logging.LogRecord) -> None:
        if logging.getLogger(logger.name) is not logger or record.exc_info or record.stack_info:
            self._refuse("it logs something a graph does not record")
        args = record.args if isinstance(record.args, tuple) else (record.args,)
        where = logger.name, record.levelno, record.pathname, record.lineno, record.funcName
        self._record(log_values, (*where, record.msg, *args), {})

    def _record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args = map_aggregate(args, self._argument)
        self._tracer.create_proxy("call_function", function, args, kwargs)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy) or (isinstance(value, _PLAIN) and not isinstance(value, str)):
            return value
        if not isinstance(value, str):
            self._refuse(f"it prints or logs an object, a {type(value).__name__}")
        pieces: list[Any] = _MARK.split(value)
        if len(pieces) == 1:
            return value
        for at in range(1, len(pieces), 2):
            number = int(pieces[at])
            self._said.add(number)
            pieces[at] = self._formats[number]
        return self._tracer.create_proxy("call_function", make_text, tuple(pieces), {})

    def _refuse(self, what: str) -> Any:
        self._refusals.refuse(OutputError(what))


def _caller(frame: FrameType | None = None) -> FrameType:
    """Return the innermost frame, from a frame on, that is not of the tracer or of torch's calls of modules."""
    frame = sys._getframe(1) if frame is None else frame
    while frame.f_globals.get("__name__", "").startswith(_BETWEEN) and frame.f_back is not None:
        frame = frame.f_back
    return frame
