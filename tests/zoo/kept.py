"""The kept table: rows as JSON, and the same as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.zoo import catalogue
from tests.zoo.catalogue import LIBRARIES
from tests.zoo.row import Row
from tests.zoo.table import markdown

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks" / "zoo"


def read(folder: Path = FOLDER) -> dict[str, Any]:
    """Return what was kept; without rows, if nothing was."""
    file = folder / "zoo.json"
    return json.loads(file.read_text()) if file.exists() else {"pending": [], "rows": []}


def rows_of(data: Mapping[str, Any]) -> list[Row]:
    """The rows of what was kept."""
    return [Row.of(row) for row in data["rows"]]


def write(rows: Iterable[Row], folder: Path = FOLDER) -> None:
    """Keep these rows, in the order of the libraries."""
    ordered = sorted(rows, key=lambda row: _order(row.key))
    data = {
        "pending": sorted(catalogue.keys() - {row.key for row in ordered}, key=_order),
        "rows": [row.to_dict() for row in ordered],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zoo.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    (folder / "zoo.md").write_text(page(data))


def page(data: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    return markdown(rows_of(data), [tuple(key) for key in data["pending"]])


def _order(key: tuple[str, str]) -> tuple[int, str]:
    return LIBRARIES.index(key[0]), key[1]


def with_row(rows: Sequence[Row], new: Row) -> list[Row]:
    """The rows with one more, or another in the place of the same model's."""
    return [*(row for row in rows if row.key != new.key), new]
