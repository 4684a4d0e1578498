"""Command-line options, threads and result files, shared by the benchmarks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def parser_of(description: str | None, *, quick: str, on_device: bool = True, draws: bool = True) -> Any:
    """Return a parser of ``--quick``, ``--tiny`` and ``--json``, to which a script can add.

    Args:
        description: the script's docstring.
        quick: what ``--quick`` leaves out.
        on_device: True to add ``--device`` and ``--threads``.
        draws: True to add ``--plot``.
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
    """Let torch compute with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_results(script: str, options: argparse.Namespace, rows: Sequence[Any] | Mapping[str, Sequence[Any]]) -> None:
    """Write rows as JSON to ``options.json``, with the command that gave them; nothing without a path.

    Args:
        script: the benchmark's ``__file__``.
        options: its parsed options.
        rows: dataclasses, in lists by name if there are several tables.
    """
    if options.json is None:
        return
    size = [f"--{name}" for name in ("quick", "tiny") if getattr(options, name)]
    command = " ".join(["python", f"examples/benchmarks/{Path(script).name}", *size])
    named = rows if isinstance(rows, Mapping) else {"rows": rows}
    data = {name: [asdict(row) for row in each] for name, each in named.items()}
    unfinished = options.json.with_name(options.json.name + ".part")  # what is there stays whole, whatever happens
    unfinished.write_text(json.dumps({"command": command, "torch": torch.__version__, **data}, indent=1) + "\n")
    unfinished.replace(options.json)


def read_rows(results: Mapping[str, Any], row: type[T], name: str = "rows") -> list[T]:
    """Return the rows of one table in what `write_results` wrote, as instances of ``row``."""
    return [row(**{key: _as_written(value) for key, value in each.items()}) for each in results[name]]


def _as_written(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
