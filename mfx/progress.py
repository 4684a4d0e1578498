"""One line that says what a person at a terminal is waiting for."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE = 2.0  # seconds of silence


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Within this context, say after two seconds what the work is; the line is taken back when it is done.

    Of work within work, the inner one's line takes the place of the outer one's until it is done. It goes to ``stderr``
    where that is a terminal, and stays away from the logs of notebooks and jobs. The environment variable
    ``MFX_PROGRESS`` says otherwise: 0 for silence everywhere, 1 for a line everywhere.

    Args:
        what: the work, such as ``"capturing BertModel"``.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if os.environ.get("MFX_PROGRESS", "1" if is_terminal else "0") == "0":
        yield
        return
    line, is_done = f"mfx: {what} …", threading.Event()

    def say() -> None:
        with _LOCK:
            if is_done.is_set():  # while this waited for the lock
                return
            if is_terminal:
                _erase()
            _SAID.append(line)
            print(line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)

    timer = threading.Timer(_PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with _LOCK:
            is_done.set()
            if line in _SAID:
                if is_terminal:
                    _erase()
                _SAID.remove(line)
                if is_terminal and _SAID:
                    print(_SAID[-1], end="", file=sys.stderr, flush=True)


_LOCK = threading.Lock()
_SAID: list[str] = []  # the lines of work that is not done; the last one is the one that is seen


def _erase() -> None:
    if _SAID:
        print(f"\r{' ' * len(_SAID[-1])}\r", end="", file=sys.stderr, flush=True)
