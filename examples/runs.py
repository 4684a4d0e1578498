"""Measured runs, one JSON file each: a script that is stopped goes on with those that are missing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class Runs:
    """A folder with one JSON file per run.

    Args:
        folder: it is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what a run gave, from its file if it was done before.

        Args:
            name: the file's, without ``.json``.
            measure: makes the run and returns plain data.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            data, unfinished = measure(), path.with_suffix(".part")
            unfinished.write_text(json.dumps(data, indent=1) + "\n")
            unfinished.rename(path)  # a file is there as a whole or not at all
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def write(self, path: Path, command: str) -> None:
        """Write all runs that are done to one file, with the command that makes them and torch's version."""
        results = {"command": command, "torch": torch.__version__, "runs": self.all()}
        path.write_text(json.dumps(results, indent=1) + "\n")

    def all(self) -> list[dict[str, Any]]:
        """Return all runs that are done, in the order of their names."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Return the mean, and the standard deviation if there are several values.

    >>> spread([1.0, 2.0, 3.0], ".1f"), spread([1.0], ".1f")
    ('2.0 ± 1.0', '1.0')
    """
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean
