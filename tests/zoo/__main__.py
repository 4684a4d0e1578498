"""Judge the zoo and write the table: ``python -m tests.zoo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tests.zoo import kept
from tests.zoo.catalogue import LIBRARIES, entries
from tests.zoo.sweep import sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge models one by one; the table is written after each, so that nothing is lost.

    Returns:
        0 if all rows are right, else 1.
    """
    options = parser().parse_args(arguments)
    wanted = [
        (library, entry.name)
        for library in options.library
        for entry in entries(library)
        if entry.is_installed and (not options.models or entry.name in options.models)
    ]
    rows = kept.rows_of(kept.read(options.to))
    if options.resume:
        done = {row.key for row in rows if row.is_right}
        wanted = [key for key in wanted if key not in done]
    right = True
    with tqdm(total=len(wanted)) as bar:
        for row in sweep(wanted, options.jobs):
            rows = kept.with_row(rows, row)
            kept.write(rows, options.to)
            right &= row.is_right
            if not row.is_right:
                tqdm.write(f"{row.library} {row.model}: {row.failure or row.verdict}", file=sys.stderr)
            bar.set_postfix_str(row.model)
            bar.update()
    kept.write(rows, options.to)
    return 0 if right else 1


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--library", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--models", nargs="+", help="only these, by name")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: 1)")
    parser.add_argument("--to", type=Path, default=kept.FOLDER, help="folder of zoo.json and zoo.md")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there and right")
    return parser


if __name__ == "__main__":
    sys.exit(main())
