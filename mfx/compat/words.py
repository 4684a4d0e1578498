"""Words of memory that change when something is written: to compare many of them takes one look.

Where they lie is an implementation's own, so each place is tried out, and not used where it is another one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

Word = memoryview
_SIZE = ctypes.sizeof(ctypes.c_void_p)


def words_at(address: int, size: int = _SIZE) -> Word:
    """Return the memory at an address, which the caller keeps in being; ``size`` in bytes."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


class Sign(NamedTuple):
    """Tells changes of something: by words of memory, and, if they do not tell all, by what ``rest`` returns."""

    words: Sequence[Word]
    rest: Callable[[], Hashable] | None = None


def sign_reader(signs: Sequence[Sign]) -> Callable[[], Hashable]:
    """Return a function that reads all these signs."""
    read = partial(b"".join, [*chain.from_iterable(sign.words for sign in signs)])
    if others := [sign.rest for sign in signs if sign.rest is not None]:
        return lambda: (read(), *[other() for other in others])
    return read


def version_reader(tables: Sequence[Any], objects: Sequence[Any] = ()) -> Callable[[], object]:
    """Return a function whose results are equal as long as nothing is written; where that cannot be seen, no two are.

    Args:
        tables: dictionaries.
        objects: whatever may get another class, or another ``__dict__``.
    """
    sign = version_sign(tables, objects)
    return object if sign is None else sign_reader([sign])


def version_sign(tables: Sequence[Any], objects: Sequence[Any] = ()) -> Sign | None:
    """Return what tells writes, as for `version_reader`; None where that cannot be seen.

    Plain dictionaries have versions up to CPython 3.12. An ordered one can be reordered without a new version.
    """
    owners = [thing for thing in objects if hasattr(thing, "__dict__")]
    words = [*map(_version_of, tables), *map(_class_of, objects), *map(_dict_of, owners)]
    found = [word for word in words if word is not None]
    return Sign(found) if len(found) == len(words) else None


def _version_of(table: Any) -> Word | None:
    return words_at(id(table) + _VERSION) if type(table) is dict and _VERSION else None


def _class_of(thing: Any) -> Word | None:
    return _pointer(id(thing) + _SIZE, type(thing))  # behind the count of references


def _dict_of(thing: Any) -> Word | None:
    """Return where an object refers to its ``__dict__``; since CPython 3.11 it is in front of most objects."""
    offset = type(thing).__dictoffset__
    return _pointer(id(thing) + (offset if offset > 0 else -3 * _SIZE), thing.__dict__)


def _pointer(address: int, thing: object) -> Word | None:
    """Return the word at an address, if it refers to a thing."""
    word = words_at(address)
    return word if int.from_bytes(word, sys.byteorder) == id(thing) else None


class _Thing:
    def __init__(self) -> None:
        self.value: object = 0


def _find_version() -> int:
    """Return the offset of a dictionary's version in its memory; 0 if it does not tell writes apart."""
    offset = 3 * _SIZE  # behind the object's head and the number of entries
    if sys.implementation.name != "cpython" or dict.__basicsize__ < offset + _SIZE:
        return 0
    thing = _Thing()
    table, writes = thing.__dict__, (thing.__setattr__, thing.__dict__.__setitem__)
    read = words_at(id(table) + offset).tobytes
    seen = {read()}
    for number in range(1, 64):  # Python compiles what runs often in another way
        thing.value = object()
        seen.add(read())
        writes[number % 2]("value", object())
        seen.add(read())
        del table["value"]
        seen.add(read())
        table.update(value=number)
        seen.add(read())
    return offset if len(seen) == 4 * 63 + 1 and read() in seen else 0


_VERSION = _find_version()
