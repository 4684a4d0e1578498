"""Traced values that somebody still refers to once a trace is over: found by the garbage collector, and taken away."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from functools import _lru_cache_wrapper
from types import CellType, FrameType
from typing import Any

from torch import fx

from mfx.modules.holders import slots_of

_FEW = 4


class Leftovers:
    """The proxies of one trace, by weak references: none of them may outlive it.

    Attributes:
        found: the types of what referred to one after the trace.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._proxies: list[weakref.ref[fx.Proxy]] = []

    def add(self, proxy: fx.Proxy) -> None:
        """Take note of a proxy."""
        self._proxies.append(weakref.ref(proxy))

    def take_away(self, *, failed: bool = False) -> None:
        """Take the proxies that are still alive out of what refers to them.

        Args:
            failed: True after a trace that failed: nobody asks what refers to them, garbage or the frames of its error.
        """
        found: dict[str, None] = {}
        for _ in range(4):  # what holds a proxy may be held by one
            if not (alive := self._uncollected(_FEW if failed else 0)):
                break
            for proxy in alive:
                found.update(dict.fromkeys(_take_out(proxy, {id(alive)}, 4)))
            alive.clear()
            proxy = None
        self.found = list(found)

    def _uncollected(self, few: int) -> list[Any]:
        """Return the proxies that are left when reference cycles are collected that nobody refers to.

        A closure that calls itself is one. The youngest objects come first, and the others only if more than ``few``
        proxies are left: to look at all objects of a large program takes a second.
        """
        for generation, enough in enumerate((0, 0, few)):
            if len(self._alive()) <= enough:
                break
            gc.collect(generation)
        return self._alive()

    def _alive(self) -> list[Any]:
        return [proxy for reference in self._proxies if (proxy := reference()) is not None]


def _take_out(value: Any, seen: set[int], depth: int) -> list[str]:
    """Take a value out of all that refers to it; return the types of that."""
    referrers = gc.get_referrers(value)
    seen.add(id(referrers))
    found: list[str] = []
    for holder in referrers:
        if id(holder) not in seen and not isinstance(holder, FrameType):
            seen.add(id(holder))
            found += _take_out_of(holder, value, seen, depth)
    return found


def _take_out_of(holder: Any, value: Any, seen: set[int], depth: int) -> list[str]:
    if isinstance(holder, dict):
        for key in [key for key, item in list(holder.items()) if item is value or key is value]:
            del holder[key]
    elif isinstance(holder, list | deque):
        kept = [item for item in holder if item is not value]
        holder.clear()
        holder.extend(kept)
    elif isinstance(holder, set):
        kept = [item for item in holder if item is not value]
        holder.clear()
        holder.update(kept)
    elif isinstance(holder, CellType):
        del holder.cell_contents
    elif isinstance(holder, _lru_cache_wrapper):
        holder.cache_clear()
    elif not isinstance(holder, fx.Proxy) and (names := _names_of(holder, value)):
        for name in names:
            object.__delattr__(holder, name)
    else:  # a tuple, a generator: whatever refers to it
        return _take_out(holder, seen, depth - 1) if depth else []
    return [type(holder).__name__]


def _names_of(holder: Any, value: Any) -> list[str]:
    """Return the attributes of an object that are a value."""
    names = [*getattr(holder, "__dict__", ()), *slots_of(type(holder))]
    return [name for name in names if getattr(holder, name, None) is value]
