"""Dynamo's sources of tensors and modules, as paths in a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_ITEM = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_TABLES = frozenset({"_modules", "_parameters", "_buffers"})
_IN_TABLE = re.compile(r"\._(modules|parameters|buffers)\[.*$")


def is_held_by_module(source: str) -> bool:
    """True if a source is that of a parameter or buffer of a module; False for that of an argument, for example.

    >>> is_held_by_module("L['self']._modules['fc']._parameters['weight']")
    True
    >>> is_held_by_module("L['kwargs']['weight']")
    False
    """
    return re.search(r"\._(parameters|buffers)\['[^']*'\]$", source) is not None


def model_in(sources: Sequence[str], variable: str | None) -> str:
    """Return the source of the model that a graph runs: paths are relative to it, whatever variable holds it.

    Args:
        sources: those of the graph's inputs.
        variable: the local variable that holds the module whose forward is compiled; None if that is a function.

    Returns:
        The source of that module; else of the only module that is read, or what several have in common.

    >>> model_in(["L['this']._modules['fc']._parameters['weight']", "G['norm']._buffers['mean']"], "this")
    "L['this']"
    >>> model_in(["L['trainer'].model._modules['fc']._parameters['weight']", "L['x']"], None)
    "L['trainer'].model"
    >>> model_in(["L['run'].a._modules['fc']._parameters['weight']", "L['run'].b._buffers['mean']"], None)
    "L['run']"
    """
    own = f"L[{variable!r}]"
    roots = sorted({_IN_TABLE.sub("", source) for source in sources if is_held_by_module(source)})
    if any(_below(own, root) is not None for root in roots):
        return own
    items = zip(*map(_split, roots), strict=False)
    return "".join(alike[0] for alike in takewhile(lambda alike: len(set(alike)) == 1, items))


def module_path(source: str, model: str = "L['self']") -> tuple[str, ...]:
    """Return the names on the path from the model to a source; a source outside of it begins with its own name.

    >>> module_path("L['self']._modules['blocks']._modules['0']._parameters['weight']")
    ('blocks', '0', 'weight')
    >>> module_path("L['other'].blocks.0")
    ('other', 'blocks', '0')
    """
    below = _below(model, source)
    found = _ITEM.findall(source if below is None else below)
    return tuple(name for names in found if (name := next(filter(None, names), "")) not in _TABLES)


def _below(model: str, source: str) -> str | None:
    """Return the rest of a source inside of a model; None for other sources."""
    rest = source.removeprefix(model)
    return rest if model and source.startswith(model) and rest[:1] in ("", ".", "[") else None


def _split(source: str) -> list[str]:
    """Return a source item by item: ``L['run']``, ``.model``."""
    return re.findall(r"^[LG]?\[[^]]*\]|\[[^]]*\]|\.\w+|^\w+", source)
