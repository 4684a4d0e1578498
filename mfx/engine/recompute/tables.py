"""The dictionaries in which Python looks attributes up, found, compared and written into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from mfx.compat import Table, is_sharded, tensor_tables
from mfx.modules.holders import slots_of
from mfx.modules.references import attributes_of, is_users_class


@dataclass(frozen=True, eq=False)
class TensorSlot:
    """The place of a tensor: ``name`` in ``table``; ``label`` is its dotted path."""

    table: Table
    name: str
    label: str
    is_parameter: bool

    def get(self) -> Any:
        """Return the present value, without calling ``__getattr__``."""
        return self.table.get(self.name)

    def put(self, value: Any) -> None:
        """Set the value, without calling ``__setattr__``."""
        self.table[self.name] = value


def set_contents(table: Table, contents: dict[Any, Any], values: Mapping[int, Any] | None = None) -> None:
    """Let a table hold ``contents``, in their order, but for the ``values``, by the identity of what they replace."""
    for name in table.keys() - contents.keys():
        del table[name]
    table.update({name: values.get(id(value), value) for name, value in contents.items()} if values else contents)
    if list(table) != list(contents):
        ordered = {name: table[name] for name in contents}
        table.clear()
        table.update(ordered)


def unless_sharded(table: Table, name: str, value: Any) -> Any:
    """Return a value, or what is there now if FSDP2 looks after it: shards outside of a forward, and wholes inside."""
    now = table.get(name, value)
    return now if now is not value and (is_sharded(now) or is_sharded(value)) else value


def set_types(modules: Sequence[nn.Module], types: Sequence[type]) -> list[nn.Module]:
    """Give modules the classes they had; return those that had others: with parametrizations, classes of their own."""
    others = [(module, cls) for module, cls in zip(modules, types, strict=True) if type(module) is not cls]
    for module, cls in others:
        module.__class__ = cls
    return [module for module, _ in others]


def dict_of(holder: Any) -> Any:
    """Return the dictionary that holds the attributes of an object, which another one can replace; None without one."""
    own = getattr(holder, "__dict__", None)
    return own if type(own) is dict else None  # that of a class is none


def set_dicts(holders: Sequence[Any], dicts: Sequence[Any]) -> None:
    """Give objects the dictionaries that held their attributes, in the place of those that replaced them."""
    for holder, own in zip(holders, dicts, strict=True):
        if dict_of(holder) is not own:
            object.__setattr__(holder, "__dict__", own)


def table_of(holder: Any, name: str) -> Table | None:
    """Return the table that has an attribute; None for what is computed, such as a property."""
    return next((table for table in _tables(holder) if name in table), None)


def tables_before(holder: Any, table: Table) -> list[Table]:
    """Return the tables that Python looks an attribute up in before it looks into one."""
    return list(takewhile(lambda other: other is not table, _tables(holder)))


def _tables(holder: Any) -> list[Any]:
    tables: list[Any] = [getattr(holder, "__dict__", {})]
    return [*tables, *tensor_tables(holder), holder._modules] if isinstance(holder, nn.Module) else tables


class Slots(MutableMapping[str, Any]):
    """The attributes of an object that lie in ``__slots__``, as a table."""

    def __init__(self, value: Any) -> None:
        self._value, self._names = value, slots_of(type(value))

    def __getitem__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self._value, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._value, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._value, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if hasattr(self._value, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def tables_in(value: Any) -> list[Any]:
    """Return the tables with the attributes of an object that the user's code writes into; none for other objects."""
    attributes = attributes_of(value)
    has_slots = is_users_class(type(value)) and slots_of(type(value))
    return [*([] if attributes is None else [attributes]), *([Slots(value)] if has_slots else [])]
