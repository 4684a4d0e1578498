"""Versions of dictionaries, by which one look tells that nothing was written into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def version_reader(tables: Sequence[Any]) -> Callable[[], object]:
    """Return a function whose results are equal as long as nothing is written into any of these tables.

    Where versions cannot be read, and for tables that are not plain dictionaries (an ordered one can be reordered
    without a new version), no two results are equal.
    """
    if _VERSION is None or any(type(table) is not dict for table in tables):
        return object
    read = _VERSION
    return lambda: [*map(read, tables)]


class _Thing:
    def __init__(self) -> None:
        self.value: object = 0


def _find() -> Callable[[dict[Any, Any]], int] | None:
    """Return the function of TorchDynamo's guards that reads a version, if it tells writes apart (torch 2.11 to 2.15).

    Up to Python 3.11 it reads a field of the dictionary, after that it watches it.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    read: Callable[[dict[Any, Any]], int] | None = getattr(guards, "dict_version", None)
    if read is None:
        return None
    thing = _Thing()
    table, writes = thing.__dict__, (thing.__setattr__, thing.__dict__.__setitem__)
    seen = {read(table)}
    for number in range(1, 64):  # Python compiles what runs often in another way
        thing.value = object()
        seen.add(read(table))
        writes[number % 2]("value", object())
        seen.add(read(table))
        del table["value"]
        seen.add(read(table))
        table.update(value=number)
        seen.add(read(table))
    return read if len(seen) == 4 * 63 + 1 and read(table) in seen else None


_VERSION = _find()
