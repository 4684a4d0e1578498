"""Lengths that the arguments of an operation tell, or the code that unpacks its value."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def known_length(node: fx.Node) -> int | None:
    """Return the length of what a node returns, if its arguments tell it."""
    if node.target in ("chunk", torch.chunk):
        count = node.args[1] if len(node.args) > 1 else node.kwargs.get("chunks")
        return count if isinstance(count, int) else None
    if node.target in ("split", torch.split):
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("split_size_or_sections")
        return len(sizes) if isinstance(sizes, list | tuple) else None
    if node.target in ("tensor_split", torch.tensor_split):
        borders = node.args[1] if len(node.args) > 1 else node.kwargs.get("indices")
        return len(borders) + 1 if isinstance(borders, list | tuple) else None
    if node.target is operator.getitem and isinstance(node.args[1], slice):
        return _length_of_slice(node.args[1])
    return None


def check_length(value: Any, length: int, *, is_least: bool = False) -> None:
    """Check, as a node of a graph, that a value has the length that it is unpacked to, or at least this one.

    Raises:
        ValueError: it has not, with the words of Python.
    """
    found = len(value)
    if found < length:
        least = "at least " if is_least else ""
        raise ValueError(f"not enough values to unpack (expected {least}{length}, got {found})")
    if found > length and not is_least:
        raise ValueError(f"too many values to unpack (expected {length})")


def _length_of_slice(part: slice) -> int | None:
    """Return the length of ``values[part]`` of a long enough sequence: 2 for ``[-2:]``, ``[:2]`` and ``[1:3]``."""
    start, stop = part.start or 0, part.stop
    if part.step is not None or not isinstance(start, int) or not isinstance(stop, int | None):
        return None
    if stop is None:
        return -start if start < 0 else None
    return max(stop - start, 0) if (start < 0) == (stop < 0) else None
