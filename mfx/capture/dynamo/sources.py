"""Where Dynamo found a tensor or a module, in terms of a model."""

from __future__ import annotations

import re

_ITEM = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_TABLES = frozenset({"_modules", "_parameters", "_buffers"})


def is_held_by_module(source: str) -> bool:
    """Whether a source is that of a parameter or buffer of a module, and not of an argument, say.

    >>> is_held_by_module("L['self']._modules['fc']._parameters['weight']")
    True
    >>> is_held_by_module("L['kwargs']['weight']")
    False
    """
    return re.search(r"\._(parameters|buffers)\['[^']*'\]$", source) is not None


def place(source: str) -> tuple[str, ...]:
    """The way from the model to what a source speaks of; what is no part of ``self`` begins with its own name.

    >>> place("L['self']._modules['blocks']._modules['0']._parameters['weight']")
    ('blocks', '0', 'weight')
    >>> place("L['other'].blocks.0")
    ('other', 'blocks', '0')
    """
    parts = [next(filter(None, found), "") for found in _ITEM.findall(source)]
    way = [part for part in parts if part not in _TABLES]
    return tuple(way[1:] if way[:1] == ["self"] else way)
