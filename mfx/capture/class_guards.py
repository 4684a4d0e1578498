"""Guards on classes: what a model's code finds there is as it was when the code was traced."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import FunctionType
from typing import Any

from torch import nn

from mfx.capture.snapshots import ABSENT, CONTAINERS, DEEP, PLAIN, Noted, is_as, noted
from mfx.modules.references import attributes_of, is_users_class

_MAKES = frozenset({"__init__", "__new__", "__init_subclass__", "__post_init__"})  # objects, which no forward does
_FEW = 64


@dataclass(frozen=True, slots=True)
class ClassGuard:
    """A class of the user's, without its bases: plain values, special methods, and all that code mentions.

    Args:
        kind: the class.
        names: those that code mentions, without what may change.
        values: what it has of these.
        keys: all names that it has.
    """

    kind: type
    names: frozenset[str]
    values: tuple[Noted, ...]
    keys: tuple[str, ...]

    @classmethod
    def of(cls, kind: type, names: frozenset[str], assigned: Collection[str] = ()) -> ClassGuard:
        """Return a guard on a class as it is now; the attributes in ``assigned`` may change."""
        values = [
            noted(name, value, frozenset() if isinstance(value, FunctionType) else names)
            for name, value in vars(kind).items()
            if name not in assigned
            and (_may_be_read(name, value, names) or (isinstance(value, PLAIN) and not _is_special(name)))
        ]
        return cls(kind, names.difference(assigned), tuple(values), tuple(vars(kind)))

    @classmethod
    def loaded(cls, module: str, name: str, names: frozenset[str], data: Sequence[Noted], keys: Any) -> ClassGuard:
        """Return a guard on the class of this name, for the data that a saved guard had; all else is as it is now."""
        kind = _found(module, name)
        if kind is None:  # what is there of it cannot be told
            return cls(object, frozenset(), (), tuple(vars(object)))
        now, of_saved = cls.of(kind, names), {name for name, *_ in data}
        return replace(now, values=(*data, *(value for value in now.values if value[0] not in of_saved)), keys=keys)

    def in_place(self) -> bool:
        """True: a class is no place for modules."""
        return True

    def holds(self) -> bool:
        """True if all of it is as it was."""
        own = vars(self.kind)
        for name, fixed, before_and_look in self.values:
            value = own.get(name, ABSENT)
            if value is not fixed and not is_as(value, *before_and_look):
                return False
        if tuple(own) == self.keys:
            return True
        return not any(_may_be_read(name, own[name], self.names) for name in own.keys() - set(self.keys))

    def __deepcopy__(self, memo: Any) -> ClassGuard:
        return self

    def __reduce__(self) -> Any:
        own = vars(self.kind)
        data = tuple(value for value in self.values if _is_data(own.get(value[0], ABSENT)))
        return ClassGuard.loaded, (self.kind.__module__, self.kind.__qualname__, self.names, data, self.keys)


def guards_of_classes(
    modules: Iterable[nn.Module], assigned: Collection[str], names: frozenset[str]
) -> Iterator[ClassGuard]:
    """Yield guards on the classes of modules, and on classes and those of objects in attributes that code mentions.

    Args:
        modules: the modules.
        assigned: names of attributes that may change.
        names: those that code mentions.
    """
    seen: set[type] = set()
    for module in modules:
        held = {name: value for name, value in module.__dict__.items() if name in names}
        todo = [type(module), *_classes_in(held, names, DEEP)]
        while todo:
            for base in todo.pop().__mro__:
                if base not in seen and is_users_class(base):
                    seen.add(base)
                    yield ClassGuard.of(base, names, assigned)
                    todo += _classes_in({n: v for n, v in vars(base).items() if n in names}, names, DEEP)


def _classes_in(value: Any, names: frozenset[str], depth: int) -> Iterator[type]:
    """Yield the user's classes, and those of the objects, in a value, as far as code mentions what leads there."""
    if isinstance(value, nn.Module) or not depth:
        return
    if isinstance(value, CONTAINERS):
        held = value.values() if isinstance(value, dict) else value
        for item in held if len(value) <= _FEW else ():
            yield from _classes_in(item, names, depth - 1)
        return
    kind = value if isinstance(value, type) else type(value)
    if is_users_class(kind):
        yield kind
        attributes = {} if kind is value else attributes_of(value) or {}
        yield from _classes_in({name: attributes[name] for name in names & attributes.keys()}, names, depth - 1)


def _may_be_read(name: str, value: Any, names: frozenset[str]) -> bool:
    """True if code says a name, or Python says it in its place."""
    if _is_special(name):
        return isinstance(value, FunctionType) and name not in _MAKES
    return name in names or name == "forward"


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_data(value: Any) -> bool:
    """True for plain values and the builtin containers of these, which can be pickled whatever their class holds."""
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_data, value))
    if type(value) is dict:
        return all(map(_is_data, (*value, *value.values())))
    return isinstance(value, PLAIN) and not isinstance(value, Enum)


def _found(module: str, name: str) -> type | None:
    """Return the class that a module has under a name; None if it has none."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None
