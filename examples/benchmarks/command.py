"""What the benchmarks' commands have in common: options, threads, files of rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

__all__ = ["on_threads", "parser_of", "write_rows"]


def parser_of(description: str | None, *, quick: str, on_device: bool = True, draws: bool = True) -> Any:
    """A parser of ``--quick``, ``--tiny`` and ``--json``, to which a script can add.

    Args:
        description: the script's docstring.
        quick: what ``--quick`` leaves out.
        on_device: whether there are ``--device`` and ``--threads``, too.
        draws: whether there is ``--plot``, too.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick}: under a minute")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    if on_device:
        parser.add_argument("--device", default="cpu", type=torch.device)
        parser.add_argument("--threads", type=int, default=1, help="of torch; more than one needs an idle machine")
    if draws:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, too")
    return parser


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Have torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_rows(rows: Sequence[Any] | Mapping[str, Sequence[Any]], path: Path | None) -> None:
    """Write dataclasses as JSON, in lists by name if there are several; nothing without a path."""
    if path is None:
        return
    if isinstance(rows, Mapping):
        data: Any = {name: [asdict(row) for row in each] for name, each in rows.items()}
    else:
        data = [asdict(row) for row in rows]
    path.write_text(json.dumps(data, indent=1))
