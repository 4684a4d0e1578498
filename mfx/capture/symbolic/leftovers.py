"""Traced values that somebody still refers to once a trace is over: found by the garbage collector, and taken away."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection
from functools import _lru_cache_wrapper
from types import CellType, FrameType
from typing import Any

from torch import fx

from mfx.modules.holders import slots_of

_FEW = 4
_DEPTH = 5  # an attribute that holds a tuple of generators of tuples of proxies


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
            found.update(dict.fromkeys(_take_out(alive)))
            alive.clear()
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


def _take_out(values: list[Any]) -> list[str]:
    """Take values out of all that refers to them; return the types of that.

    Each search for what refers to something looks at all objects of the program, so it is made for all values at once.
    What refers to one and cannot be changed, a tuple or a generator, is taken out of what refers to it.
    """
    found: list[str] = []
    seen: set[int] = set()
    for _ in range(_DEPTH):
        wanted = {id(value) for value in values}
        referrers = gc.get_referrers(*values)
        seen |= wanted | {id(values), id(referrers)}
        values = []
        seen.add(id(values))
        for holder in referrers:
            if id(holder) in seen or isinstance(holder, FrameType):
                continue
            seen.add(id(holder))
            if _take_out_of(holder, wanted):
                found.append(type(holder).__name__)
            else:
                values.append(holder)
        if not values:
            break
    return found


_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, deque, set)


def _take_out_of(holder: Any, wanted: Collection[int]) -> bool:
    """Take values, known by identity, out of what holds them; False if it cannot be changed."""
    kinds: Any = type(holder).__mro__
    kind = next((kind for kind in kinds if kind in _CONTAINERS), None)  # the methods of other classes may refuse
    if isinstance(holder, dict) and kind is not None:
        items = list(kind.items(holder))
        for key in [key for key, item in items if id(item) in wanted or id(key) in wanted]:
            kind.__delitem__(holder, key)
    elif kind is not None:
        kept = [item for item in kind.__iter__(holder) if id(item) not in wanted]
        kind.clear(holder)
        (kind.update if kind is set else kind.extend)(holder, kept)
    elif isinstance(holder, CellType):
        del holder.cell_contents
    elif isinstance(holder, _lru_cache_wrapper):
        holder.cache_clear()
    elif not isinstance(holder, fx.Proxy) and (names := _names_of(holder, wanted)):
        for name in names:
            object.__delattr__(holder, name)
    else:
        return False
    return True


def _names_of(holder: Any, wanted: Collection[int]) -> list[str]:
    """Return the attributes of an object that are one of some values."""
    names = [*getattr(holder, "__dict__", ()), *slots_of(type(holder))]
    return [name for name in names if id(getattr(holder, name, None)) in wanted]
