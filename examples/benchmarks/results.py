"""Print the tables of the benchmarks' page and of the guide anew, from the results that the benchmarks wrote.

    python examples/benchmarks/memory.py --json examples/benchmarks/results/memory.json
    python examples/benchmarks/results.py

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``, below the command that measured it. The table
of the residual adds that stay as they were is printed from the code, which decides it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from examples.benchmarks.command import read_rows
from mfx_passes.ir import refusals

FOLDER = Path(__file__).parent
GUIDE = FOLDER.parent / "guide"
PAGES = (FOLDER / "README.md", GUIDE / "benchmarks.md", GUIDE / "gamma.md", GUIDE / "limits.md")
_OF_EXAMPLES = ("train_code_model", "random_signs")  # that compare trainings
_COMPARED = re.compile(r"plain|checkpoint, (every block|.*√.*)|momentumnet.*|revtorch|mfx, (gamma=0|float|exact)")
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _plain(script: Any, results: Mapping[str, Any]) -> str:
    return str(script.table(read_rows(results, script.Row)))


def _arithmetic(script: Any, results: Mapping[str, Any]) -> str:
    rows = {"training": script.Training, "alone": script.Alone, "store": script.Bits}
    return str(script.table(*(read_rows(results, row, name) for name, row in rows.items())))


def _compared(script: Any, results: Mapping[str, Any]) -> str:
    """Print of the memory benchmark's largest size the methods that differ in kind."""
    rows = read_rows(results, script.Row)
    batch, depth = max((row.batch, row.depth) for row in rows)
    lines = ["| method | kept after forward | peak | FLOPs |", "|---|--:|--:|--:|"]
    lines += [
        f"| {row.method} | {row.after_forward:.1f} | {row.peak:.1f} | {row.flops:.2f} |"
        for row in rows
        if (row.batch, row.depth) == (batch, depth) and _COMPARED.fullmatch(row.method)
    ]
    return "\n".join(lines)


def _runs(script: Any, results: Mapping[str, Any]) -> str:
    return str(script.table(results["runs"]))


_PRINTERS: Mapping[str, tuple[str, Callable[[Any, Mapping[str, Any]], str]]] = {
    "arithmetic": ("arithmetic", _arithmetic),
    "compared": ("memory", _compared),
    **{name: (name, _runs) for name in _OF_EXAMPLES},
}


def tables(name: str) -> str:
    """Return the command that measured a table, and the table, in Markdown; that of refusals is the code's own."""
    if name == "refusals":
        return "\n".join(refusals.table()) + "\n"
    script, printer = _PRINTERS.get(name, (name, _plain))
    results = json.loads((FOLDER / "results" / f"{script}.json").read_text())
    folder = "examples" if script in _OF_EXAMPLES else "examples.benchmarks"
    printed = printer(import_module(f"{folder}.{script}"), results)
    return f"`{results['command']}`, torch {results['torch']}:\n\n{printed}\n"


def filled(text: str) -> str:
    """Return a page with all its tables printed anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{tables(block[2])}\n{block[3]}", text)


def main(argv: Sequence[str] | None = None) -> None:
    """Print all pages anew."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
