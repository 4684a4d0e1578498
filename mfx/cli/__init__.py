"""The command line ``mfx``, or ``python -m mfx``: explain, profile, draw and report a model from a shell.

It uses the public API and may import everything but ``mfx.__main__``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mfx.cli.commands import UsageError, run
from mfx.cli.parser import make_parser
from mfx_passes import MfxError

__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: words of the command line, without the program; by default those of this process.

    Returns:
        The exit status: 0, or 1 if the command fails. Words that cannot be read raise ``SystemExit(2)``, as argparse
        does.
    """
    parser = make_parser()
    parsed = parser.parse_args(words)
    try:
        with _warnings_as_lines():
            run(parsed)
            sys.stdout.flush()
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if parsed.traceback:
            raise
        print(f"mfx: error: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, MfxError):
        return str(error)
    return f"the model failed: {type(error).__name__}: {str(error).strip()} (--traceback shows where)"


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each of mfx's warnings once, without a place in mfx's own code; drop those of other packages."""
    printed: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message)
        if text.startswith("mfx: ") and text not in printed:
            printed.add(text)
            print(f"mfx: warning: {text.removeprefix('mfx: ')}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield
