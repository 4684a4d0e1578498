"""Guards on classes: what a model's code finds there is as it was when the code was traced."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from torch import nn

from mfx.capture.snapshots import CONTAINERS, DEEP, PLAIN, is_fixed, snapshot
from mfx.modules.references import attributes_of, is_users_class

_MAKES = frozenset({"__init__", "__new__", "__init_subclass__", "__post_init__"})  # objects, which no forward does
_FEW = 64


@dataclass(frozen=True, slots=True)
class ClassGuard:
    """A class of the user's, as far as it has names itself that code mentions, and special methods.

    Args:
        cls: the class.
        names: those that code mentions.
        fixed: the names under which it is as long as it is the same object.
        values: these objects.
        changing: the names of all else.
        snapshots: what is compared of that.
        keys: all names that it has.
    """

    cls: type
    names: frozenset[str]
    fixed: tuple[str, ...]
    values: tuple[Any, ...]
    changing: tuple[str, ...]
    snapshots: tuple[Any, ...]
    keys: frozenset[str]

    @classmethod
    def of(cls, guarded: type, names: frozenset[str]) -> ClassGuard:
        """Return a guard on a class as it is now."""
        own = vars(guarded)
        found = {name: value for name, value in own.items() if _counts(name, value, names)}
        compared = {name: snapshot(value, names, DEEP) for name, value in found.items()}
        fixed = tuple(
            name for name, value in found.items() if is_fixed(value, compared[name]) or isinstance(value, FunctionType)
        )
        changing = tuple(name for name in found if name not in fixed)
        values, snapshots = tuple(found[name] for name in fixed), tuple(compared[name] for name in changing)
        return cls(guarded, names, fixed, values, changing, snapshots, frozenset(own))

    @classmethod
    def loaded(cls, guarded: type, names: frozenset[str], before: dict[str, Any]) -> ClassGuard:
        """Return a guard on a class that may have other values than when the guard was saved."""
        now = cls.of(guarded, names)
        fixed = {name: value for name, value in zip(now.fixed, now.values, strict=True) if name not in before}
        return replace(
            now, fixed=(*fixed,), values=(*fixed.values(),), changing=(*before,), snapshots=(*before.values(),)
        )

    def in_place(self) -> bool:
        """True: what modules there are has not changed."""
        return True

    def holds(self) -> bool:
        """True if all of it is as it was."""
        own = vars(self.cls)
        if not all(map(operator.is_, map(own.get, self.fixed), self.values)):
            return False
        if self.changing and any(map(self._has_changed, self.changing, self.snapshots)):
            return False
        if len(own) == len(self.keys):
            return True
        new = own.keys() - self.keys
        return own.keys() >= {*self.fixed, *self.changing} and not any(_counts(n, own[n], self.names) for n in new)

    def _has_changed(self, name: str, before: Any) -> bool:
        own = vars(self.cls)
        return name not in own or bool(snapshot(own[name], self.names, DEEP) != before)

    def __deepcopy__(self, memo: Any) -> ClassGuard:
        return self

    def __reduce__(self) -> Any:
        before = dict(zip(self.changing, self.snapshots, strict=True))  # methods are where the class is loaded
        plain = {
            name: snapshot(value)
            for name, value in zip(self.fixed, self.values, strict=True)
            if isinstance(value, PLAIN)
        }
        return ClassGuard.loaded, (self.cls, self.names, {**plain, **before})


def guards_of_classes(
    modules: Iterable[nn.Module], assigned: Collection[str], names: frozenset[str]
) -> Iterator[ClassGuard]:
    """Yield guards on the classes of modules, and of the objects in their attributes that code mentions.

    Args:
        modules: the modules.
        assigned: names of attributes that may change.
        names: those that code mentions.
    """
    seen: set[type] = set()
    for module in modules:
        held = [value for name, value in module.__dict__.items() if name in names]
        for cls in (type(module), *_classes_in(held, names, DEEP)):
            for base in cls.__mro__:
                if base not in seen and is_users_class(base):
                    seen.add(base)
                    yield ClassGuard.of(base, names.difference(assigned))


def _classes_in(value: Any, names: frozenset[str], depth: int) -> Iterator[type]:
    """Yield the classes of objects of the user's in a value, as far as code mentions what leads there."""
    if isinstance(value, nn.Module | type) or not depth:
        return
    if isinstance(value, CONTAINERS):
        held = value.values() if isinstance(value, dict) else value
        for item in held if len(value) <= _FEW else ():
            yield from _classes_in(item, names, depth)
    elif is_users_class(type(value)):
        yield type(value)
        attributes = attributes_of(value) or {}
        yield from _classes_in([attributes[name] for name in names & attributes.keys()], names, depth - 1)


def _counts(name: str, value: Any, names: frozenset[str]) -> bool:
    """True if code may read what a class has: it says the name, or Python says it in its place."""
    if name.startswith("__") and name.endswith("__"):
        return isinstance(value, FunctionType) and name not in _MAKES
    return name in names or name == "forward"
