"""Dotted paths of modules, as in ``nn.Module.named_modules``; the root's is ``""``."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from operator import attrgetter
from typing import Any


def join(*paths: str) -> str:
    """Return the path that leads through several paths, one after the other.

    >>> join("", "encoder", "layer.0")
    'encoder.layer.0'
    """
    return ".".join(filter(None, paths))


def is_inside(path: str, outer: str) -> bool:
    """True if a path is ``outer`` or leads to something inside it.

    >>> is_inside("layer.1.fc", "layer.1"), is_inside("layer.10", "layer.1"), is_inside("layer.1", "")
    (True, False, True)
    """
    return not outer or f"{path}.".startswith(f"{outer}.")


def relative(path: str, outer: str) -> str:
    """Return a path as seen from ``outer``, ``""`` for ``outer`` itself; a path that is not inside stays as it is.

    >>> relative("layer.1.fc", "layer.1"), relative("layer.1", "layer.1"), relative("head", "layer.1")
    ('fc', '', 'head')
    """
    return path[len(outer) + 1 :] if outer and is_inside(path, outer) else path


def ancestors(path: str) -> list[str]:
    """Return the paths on the way to a path, outermost first, without the root and with the path itself.

    >>> ancestors("layer.1.fc")
    ['layer', 'layer.1', 'layer.1.fc']
    """
    return list(accumulate(path.split("."), join))


def common(paths: Iterable[str]) -> str:
    """Return the longest path that all paths are inside of.

    >>> common(["layer.1.fc", "layer.1", "layer.1.norm"]), common(["layer.1", "layer.10"])
    ('layer.1', 'layer')
    """
    shared: list[str] = []
    for names in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def resolve(root: Any, path: str) -> Any:
    """Return what lies at a path under ``root``: ``root.layer.fc`` for "layer.fc", ``root`` itself for ""."""
    return attrgetter(path)(root) if path else root
