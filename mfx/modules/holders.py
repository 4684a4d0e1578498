"""Holders of Python values that code may change: containers, attributes, variables; read, compared and put back."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_
from types import CellType, MemberDescriptorType
from typing import Any

from mfx.modules.buffers import DATA, is_buffer, numbers_of, set_numbers, size_of

ABSENT = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# Their own methods are called, not those of subclasses: a dictionary may import a package when it is iterated over.
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, tuple, deque, set)


@dataclass(frozen=True)
class Variable:
    """A variable of a module, that is an entry of its namespace."""

    namespace: dict[str, Any]
    name: str


@dataclass(frozen=True)
class _Kind:
    """A kind of holder: what it refers to, in order, and how that is put back."""

    read: Callable[[Any], tuple[Any, ...]]
    write: Callable[[Any, tuple[Any, ...]], None]


class Holder:
    """Something that refers to values, with what it referred to when it was noted.

    Args:
        value: the container, object, variable or class.
        kind: the kind of it.
        name: the expression that leads to it in the user's code.
        before: what it referred to; by default what it refers to now.
    """

    __slots__ = ("before", "kind", "name", "value")

    def __init__(self, value: Any, kind: _Kind, name: str, before: tuple[Any, ...] | None = None) -> None:
        self.value, self.kind, self.name = value, kind, name
        self.before = kind.read(value) if before is None else before

    @property
    def key(self) -> tuple[int, str]:
        """The same for holders of the same values, at all times."""
        at = self.value
        return (id(at.namespace), at.name) if isinstance(at, Variable) else (id(at), "")

    def changed(self) -> bool:
        """True if it refers to other values than before."""
        return not same(self.before, self.kind.read(self.value))

    def put_back(self) -> None:
        """Have it refer to the values from before."""
        self.kind.write(self.value, self.before)


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """True if two sequences hold the same objects, or equal plain values."""
    if len(one) != len(other):
        return False
    return all(map(is_, one, other)) or all(map(_is_same, one, other))


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and (
        (isinstance(a, _PLAIN) and a == b) or (type(a) is tuple and len(a) == len(b) and all(map(_is_same, a, b)))
    )


def holder_of(value: Any, name: str, before: tuple[Any, ...] | None = None) -> Holder | None:
    """Return a value as a holder of others; None if it holds nothing that could be put back."""
    kind = _kind_of(value)
    return None if kind is None else Holder(value, kind, name, before)


def _kind_of(value: Any) -> _Kind | None:
    kind = _KINDS.get(type(value)) or next((kind for cls, kind in _KINDS.items() if isinstance(value, cls)), None)
    if kind is not None:
        return kind
    if is_buffer(value):
        return _BUFFER if size_of(value) <= DATA else None
    return _SLOTS if slots_of(type(value)) else None


def items(value: Any, most: int) -> Iterable[tuple[str, Any]]:
    """Return what a holder refers to, each with what follows the holder's name in an expression.

    Args:
        value: the holder; a tuple is one, too.
        most: a container of more entries is not looked into.
    """
    if (own := next((cls for cls in _CONTAINERS if isinstance(value, cls)), None)) is not None:
        if own.__len__(value) > most:
            return ()
        if issubclass(own, dict):
            return ((f"[{key!r}]" if isinstance(key, str | int) else "[…]", item) for key, item in own.items(value))
        return ((f"[{i}]", item) for i, item in enumerate(own.__iter__(value)))
    if isinstance(value, CellType | Variable):
        return [("", item) for item in _KINDS[type(value)].read(value) if item is not ABSENT]
    if isinstance(value, type):
        return [(f".{name}", item) for name, item in vars(value).items() if not name.startswith("__")]
    return [(f".{name}", getattr(value, name, None)) for name in slots_of(type(value))]


def _read_dict(value: dict[Any, Any]) -> tuple[Any, ...]:
    cls = OrderedDict if isinstance(value, OrderedDict) else dict
    return (*cls.keys(value), *cls.values(value))


def _write_dict(value: dict[Any, Any], before: tuple[Any, ...]) -> None:
    cls = OrderedDict if isinstance(value, OrderedDict) else dict
    cls.clear(value)
    cls.update(value, zip(before[: len(before) // 2], before[len(before) // 2 :], strict=True))


def _sequence(cls: Any) -> _Kind:
    def write(value: Any, before: tuple[Any, ...]) -> None:
        cls.clear(value)
        cls.extend(value, before)

    return _Kind(lambda value: tuple(cls.__iter__(value)), write)


def _write_set(value: set[Any], before: tuple[Any, ...]) -> None:
    set.clear(value)
    set.update(value, before)


def _read_cell(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return (ABSENT,)


def _write_cell(cell: CellType, before: tuple[Any, ...]) -> None:
    if before[0] is ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = before[0]


def _write_variable(variable: Variable, before: tuple[Any, ...]) -> None:
    if before[0] is ABSENT:
        variable.namespace.pop(variable.name, None)
    else:
        variable.namespace[variable.name] = before[0]


def _read_class(cls: type) -> tuple[Any, ...]:
    return (*vars(cls), *vars(cls).values())


def _write_class(cls: type, before: tuple[Any, ...]) -> None:
    old = dict(zip(before[: len(before) // 2], before[len(before) // 2 :], strict=True))
    for name in vars(cls).keys() - old.keys():
        type.__delattr__(cls, name)
    for name, value in old.items():
        if vars(cls).get(name, ABSENT) is not value:
            type.__setattr__(cls, name, value)


def slots_of(cls: type) -> tuple[str, ...]:
    """Return the names of a class's slots, private ones as Python mangles them."""
    bases = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
    return tuple(name for own in bases for name, value in own.items() if type(value) is MemberDescriptorType)


def _write_slots(value: Any, before: tuple[Any, ...]) -> None:
    for name, item in zip(slots_of(type(value)), before, strict=True):
        if item is not ABSENT:
            object.__setattr__(value, name, item)
        elif hasattr(value, name):
            object.__delattr__(value, name)


DICT = _Kind(_read_dict, _write_dict)
VARIABLE = _Kind(lambda variable: (variable.namespace.get(variable.name, ABSENT),), _write_variable)
_KINDS: dict[type, _Kind] = {
    dict: DICT,
    list: _sequence(list),
    deque: _sequence(deque),
    set: _Kind(lambda value: tuple(set.__iter__(value)), _write_set),
    CellType: _Kind(_read_cell, _write_cell),
    Variable: VARIABLE,
    type: _Kind(_read_class, _write_class),
}
_SLOTS = _Kind(lambda value: tuple(getattr(value, name, ABSENT) for name in slots_of(type(value))), _write_slots)
_BUFFER = _Kind(numbers_of, set_numbers)
