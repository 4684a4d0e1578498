"""Print the tables of examples/benchmarks/README.md anew, from the results that the benchmarks wrote.

    python examples/benchmarks/memory.py --json examples/benchmarks/results/memory.json
    python examples/benchmarks/results.py

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``, below the command that measured it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from examples.benchmarks.command import read_rows

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _plain(script: Any, results: Mapping[str, Any]) -> str:
    return str(script.table(read_rows(results, script.Row)))


def _arithmetic(script: Any, results: Mapping[str, Any]) -> str:
    rows = {"training": script.Training, "alone": script.Alone, "store": script.Bits}
    return str(script.table(*(read_rows(results, row, name) for name, row in rows.items())))


_PRINTERS: Mapping[str, Callable[[Any, Mapping[str, Any]], str]] = {"arithmetic": _arithmetic}


def tables(name: str) -> str:
    """Return the command that measured ``results/NAME.json``, and its tables, in Markdown."""
    results = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    printed = _PRINTERS.get(name, _plain)(import_module(f"examples.benchmarks.{name}"), results)
    return f"`{results['command']}`, torch {results['torch']}:\n\n{printed}\n"


def filled(text: str) -> str:
    """Return a page with all its tables printed anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{tables(block[2])}\n{block[3]}", text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
