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

    It goes to ``stderr`` where that is a terminal, and stays away from the logs of notebooks and jobs. The environment
    variable ``MFX_PROGRESS`` says otherwise: 0 for silence everywhere, 1 for a line everywhere.

    Args:
        what: the work, such as ``"capturing BertModel"``.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if os.environ.get("MFX_PROGRESS", "1" if is_terminal else "0") == "0":
        yield
        return
    line = f"mfx: {what} …"
    said = threading.Event()

    def say() -> None:
        said.set()
        print(line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)

    timer = threading.Timer(_PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if said.is_set() and is_terminal:
            print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)
