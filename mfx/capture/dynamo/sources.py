"""Dynamo's sources of tensors and modules, as paths in a model."""

from __future__ import annotations

import re

_ITEM = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_TABLES = frozenset({"_modules", "_parameters", "_buffers"})


def is_held_by_module(source: str) -> bool:
    """True if a source is that of a parameter or buffer of a module; False for that of an argument, for example.

    >>> is_held_by_module("L['self']._modules['fc']._parameters['weight']")
    True
    >>> is_held_by_module("L['kwargs']['weight']")
    False
    """
    return re.search(r"\._(parameters|buffers)\['[^']*'\]$", source) is not None


def module_path(source: str) -> tuple[str, ...]:
    """Return the names on the path from the model to a source; a source outside of ``self`` begins with its own name.

    >>> module_path("L['self']._modules['blocks']._modules['0']._parameters['weight']")
    ('blocks', '0', 'weight')
    >>> module_path("L['other'].blocks.0")
    ('other', 'blocks', '0')
    """
    names = [next(filter(None, found), "") for found in _ITEM.findall(source)]
    path = [name for name in names if name not in _TABLES]
    return tuple(path[1:] if path[:1] == ["self"] else path)
