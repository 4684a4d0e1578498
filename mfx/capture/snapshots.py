"""Snapshots of values, which tell whether somebody has changed them since."""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MappingProxyType, MemberDescriptorType, MethodType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mfx.modules.references import is_users, is_users_class

PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
CONTAINERS = (list, tuple, deque, OrderedDict, dict, MappingProxyType, set, frozenset)
WHOLE = 16
"""A depth for what is plain throughout: any number of entries."""
DEEP = 3
"""A depth for all else: what it holds that is not plain is the same object or not, and may be much."""
_ENTRIES = 64
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
_FIELDS: dict[type, tuple[str, ...]] = {
    range: ("start", "stop", "step"),
    slice: ("start", "stop", "step"),
    partial: ("func", "args", "keywords"),
}


class Same:
    """A value that is compared by identity, and held so that no other one gets it.

    A copy of a net has copies of its modules and tensors, but need not have one of each object: it may leave some out.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is Same and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        is_copied = isinstance(self.value, (torch.Tensor, nn.Module, type, *_FUNCTIONS))
        return Same, (self.value if is_copied else None,)  # None is plain: no value is the same as that


def snapshot(value: Any, names: frozenset[str] = frozenset(), depth: int = WHOLE) -> Any:
    """Return what a value is, to compare: plain values, containers by what they hold, and all else by identity.

    Args:
        value: the value.
        names: those that code mentions which may read it. Of objects, these attributes count beside plain ones; where
            there are none, nobody is known to call a function.
        depth: of containers, objects and functions in each other.
    """
    kind = type(value)
    if isinstance(value, PLAIN):
        return kind, repr(value) if kind is float and not value else value  # -0.0 equals 0.0
    if not depth:
        return Same(value)
    own: Any = next((cls for cls in CONTAINERS if isinstance(value, cls)), None)  # a subclass's methods may do more
    if own in (OrderedDict, dict, MappingProxyType):
        keys = tuple([key if type(key) is str else snapshot(key, names, depth - 1) for key in own.keys(value)])
        return _held(value, keys, own.values(value), names, depth)
    if own is not None:
        held = _held(value, None, (*own.__iter__(value),), names, depth)
        return held if isinstance(held, Same) or not isinstance(value, set | frozenset) else (kind, frozenset(held[2]))
    depth = min(depth, DEEP)
    if kind in _FIELDS:
        return _held(value, None, [getattr(value, name) for name in _FIELDS[kind]], names, depth)
    if isinstance(value, _FUNCTIONS):
        parts = _parts_of_function(value) if names and depth > 1 else ()  # a new tuple is the same as none
        return (Same(value), _held(parts, None, parts, names, depth)) if parts else Same(value)
    if kind.__module__ == "numpy" and hasattr(value, "tobytes") and value.size <= _ENTRIES:
        return kind, str(value.dtype), value.shape, value.tobytes()
    if not _is_object(value):
        return Same(value)
    attributes = {n: v for n, v in _attributes(value) if isinstance(v, PLAIN) or n in names}
    return Same(value), _held(value, tuple(attributes), attributes.values(), names, depth)


def _held(value: Any, keys: Any, items: Any, names: frozenset[str], depth: int) -> Any:
    """Return the snapshot of what a value holds; of the value as one if that is too much to compare."""
    if depth <= DEEP and len(items) > _ENTRIES:
        return Same(value)
    return type(value), keys, tuple([snapshot(item, names, depth - 1) for item in items])


class _Instead(enum.Enum):
    """Stand-ins for noted values: members, because a member is itself in a copy of a net, too."""

    ABSENT = "there is none"
    CHANGING = "it may be another one and the same object"


ABSENT, _CHANGING = _Instead

Noted: TypeAlias = tuple[str, Any, tuple[Any, frozenset[str], int]]
"""A name, the value if it is as it was as long as it is this object, and its snapshot with what that was made by."""


def noted(name: str, value: Any, names: frozenset[str]) -> Noted:
    """Note the value of a name."""
    depth = WHOLE if is_plain(value) else DEEP
    before = snapshot(value, names, depth)
    return name, value if is_fixed(value, before) else _CHANGING, (before, names, depth)


def is_as(value: Any, before: Any, names: frozenset[str], depth: int) -> bool:
    """True if a value is as it was noted."""
    return bool(snapshot(value, names, depth) == before)


def is_plain(value: Any, depth: int = WHOLE) -> bool:
    """True for a plain value, a function, an object of the user's, and a list, tuple or dictionary of these."""
    if isinstance(value, list | tuple) or type(value) is dict:
        held = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(is_plain(item, depth - 1) for item in held)  # one may be in itself
    return isinstance(value, (*PLAIN, *_FUNCTIONS)) or (_is_object(value) and hasattr(value, "__dict__"))


def is_fixed(value: Any, before: Any) -> bool:
    """True if a value with this snapshot is as it was as long as it is the same object."""
    if type(value) is tuple:
        return all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN) or isinstance(before, Same)


def _is_object(value: Any) -> bool:
    """True for an object with attributes of its own that is none of torch's, and no module or class."""
    return not isinstance(value, nn.Module | type) and type(value).__module__.partition(".")[0] not in (
        "torch",
        "builtins",
    )


def _attributes(value: Any) -> Iterable[tuple[str, Any]]:
    own = getattr(value, "__dict__", None)
    of_slots = [(name, getattr(value, name)) for name in _slots_of(type(value)) if hasattr(value, name)]
    return [*(own.items() if isinstance(own, dict) else ()), *of_slots]


def _slots_of(cls: type) -> tuple[str, ...]:
    """Return the names of the attributes that the classes of the user's have slots for."""
    if (known := _slots.get(cls)) is None:
        bases = [vars(base) for base in cls.__mro__ if is_users_class(base)]
        known = tuple(name for own in bases for name, v in own.items() if isinstance(v, MemberDescriptorType))
        _slots[cls] = known
    return known


_slots: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def _parts_of_function(function: Any) -> tuple[Any, ...]:
    """Return what a function of the user's computes with beside its arguments; nothing for others."""
    if isinstance(function, MethodType):
        return function.__func__, function.__self__
    if not isinstance(function, FunctionType) or not is_users(function.__module__):
        return ()
    cells = tuple(map(_content_of, function.__closure__ or ()))
    return cells, function.__defaults__, function.__kwdefaults__, function.__dict__


def _content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return cell
