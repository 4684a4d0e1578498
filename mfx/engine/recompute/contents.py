"""The contents of containers and buffers of numbers, which code may change in place: noted, compared and copied."""

from __future__ import annotations

import copy
import sys
import zlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from io import IOBase
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mfx.modules.buffers import DATA, is_buffer, numbers_of, size_of
from mfx.modules.holders import same
from mfx.modules.iterators import position_of
from mfx.modules.python_state import is_iterator

LIMIT = 64
"""Entries of a container, or attributes of an object, up to which changes of it are seen and undone."""

_CONTAINERS: Any = (OrderedDict, dict, list, set, deque)
_COPIED = 2**16  # bytes of a buffer, up to which changes of it are undone


class Held(Protocol):
    """The contents of a container or buffer at the moment when this is made."""

    def look(self) -> Iterable[Any]:
        """Return what it holds now: the same objects as when this was made, if nothing was changed."""
        ...

    def empty(self) -> Any:
        """Return what ``filled`` makes a copy of; None if a copy is only made there."""
        ...

    def filled(self, copied: Any, renewed: Callable[[Any], Any]) -> Any:
        """Return the copy, with ``renewed`` of each entry that was there when this was made."""
        ...


class Container(Held):
    """The contents of a list, dictionary, set, deque or tuple at the moment when this is made."""

    __slots__ = ("_entries", "_keys", "_value")

    def __init__(self, value: Any) -> None:
        self._value, self._keys = value, tuple(value) if isinstance(value, dict) else ()
        self._entries = tuple(value.values()) if isinstance(value, dict) else tuple(value)

    def named(self) -> Iterable[tuple[Any, Any]]:
        """Return the entries, each with its key or index."""
        return zip(self._keys or range(len(self._entries)), self._entries, strict=True)

    def look(self) -> Iterable[Any]:  # noqa: D102
        return _inside(self._value)

    def empty(self) -> Any:  # noqa: D102
        if isinstance(self._value, tuple):
            return None
        copied = copy.copy(self._value)
        next(cls for cls in _CONTAINERS if isinstance(copied, cls)).clear(copied)
        return copied

    def filled(self, copied: Any, renewed: Callable[[Any], Any]) -> Any:  # noqa: D102
        value, entries = self._value, [renewed(entry) for entry in self._entries]
        if isinstance(value, tuple):
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        of = next(cls for cls in _CONTAINERS if isinstance(value, cls))  # subclasses may do other things
        if isinstance(value, dict):
            of.update(copied, zip(self._keys, entries, strict=True))
        elif isinstance(value, set):
            of.update(copied, entries)
        else:
            of.extend(copied, entries)
        return copied


class Buffer(Held):
    """The numbers that an array of numpy, a record of one, a ``bytearray`` or an ``array`` held when this was made."""

    __slots__ = ("_kept", "_numbers", "value")

    def __init__(self, value: Any) -> None:
        self.value, self._kept, self._numbers = value, copy.copy(value), numbers_of(value)

    def look(self) -> Iterable[Any]:  # noqa: D102
        now = numbers_of(self.value)
        same = now[:2] == self._numbers[:2]  # of objects, the bytes are addresses
        return (self._numbers if same else now,)

    def empty(self) -> Any:  # noqa: D102
        return copy.copy(self._kept)

    def filled(self, copied: Any, renewed: Callable[[Any], Any]) -> Any:  # noqa: D102
        return copied


def held_by(value: Any) -> Container | Buffer | None:
    """Return what a container or buffer holds; None if it is too large to be copied."""
    if is_buffer(value):
        return None if isinstance(value, memoryview) or size_of(value) > _COPIED else Buffer(value)
    return None if len(value) > LIMIT else Container(value)


def sign_of(value: Any) -> tuple[Any, ...]:
    """Return what tells if a container, buffer or iterator that is not copied was changed, for ``is_same_sign``."""
    if is_iterator(value):
        return (position_of(value),)
    if not is_buffer(value):
        return tuple(_inside(value))
    if isinstance(value, IOBase):
        return numbers_of(value)
    return (zlib.crc32(_contiguous(value)),) if size_of(value) <= DATA else ()


def is_same_sign(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """True if two signs of one value are the same."""
    return same(tuple(one), tuple(other))


def sharing(buffers: Sequence[Buffer], tensors: Iterable[Any]) -> set[int]:
    """Return the identities of the buffers whose memory another buffer or a tensor shares.

    A copy of such a buffer would not change with the other, nor the other with it.
    """
    buffers = [buffer for buffer in buffers if not isinstance(buffer.value, IOBase)]
    places = [(*_place_of(buffer.value), id(buffer.value)) for buffer in buffers]
    found = {
        mine
        for start, end, mine in places
        for other_start, other_end, other in places
        if other != mine and start < other_end and other_start < end
    }
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout is torch.strided:
            first = tensor.untyped_storage().data_ptr()
            last = first + tensor.untyped_storage().nbytes()
            found |= {mine for start, end, mine in places if start < last and first < end}
    return found


def _inside(value: Any) -> Iterable[Any]:
    return chain(value, value.values()) if isinstance(value, dict) else value


def _contiguous(value: Any) -> Any:
    """Return the bytes of a buffer, without a copy where that is possible."""
    if isinstance(value, bytearray | array):
        return value
    numpy = sys.modules.get("numpy")
    if numpy is None or isinstance(value, memoryview) or value.dtype.hasobject:
        return value.tobytes()
    return numpy.ascontiguousarray(value).view("u1")


def _place_of(value: Any) -> tuple[int, int]:
    """Return the first address of a buffer's memory, that of the array that it is a view of, and the one behind it."""
    while hasattr(base := getattr(value, "base", None), "__array_interface__"):
        value = base
    interface = getattr(value, "__array_interface__", None)
    if interface is not None:
        start = int(interface["data"][0])
    else:
        start = torch.frombuffer(value, dtype=torch.uint8).data_ptr() if size_of(value) else 0
    return start, start + size_of(value)
