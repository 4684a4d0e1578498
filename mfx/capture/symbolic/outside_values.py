"""Values of variables that a model's code reads outside of the model: constants to a trace, which a user may change."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from mfx.capture.snapshots import CONTAINERS, PLAIN, snapshot
from mfx.modules.references import attributes_of, is_users, is_users_class, names_in

_ABSENT = object()
_DEPTH = 3  # of objects in each other, and of functions that functions call
_FEW = 1024  # functions: a library's models name thousands
_CHANGING = (*CONTAINERS, ContextVar)  # may hold other values and be the same
_Namespace = dict[str, Any]


class OutsideValues:
    """Plain values, functions and tensors in the variables of modules, and in attributes of objects and classes there.

    Args:
        codes: code that is known to have run, with its variables.
        functions: those that may have run; if they are many, most of them did not.
    """

    def __init__(self, codes: Mapping[CodeType, _Namespace], functions: Collection[FunctionType] = ()) -> None:
        found = {}
        may_have_run = {function.__code__: function.__globals__ for function in functions}
        codes = {**codes, **may_have_run} if len(functions) <= _FEW else with_callees(codes)
        for code, namespace in codes.items():
            names = names_in(code)
            for name in sorted(names & namespace.keys()):
                for path, value, noted in _values(namespace[name], names, _DEPTH):
                    found[id(namespace), name, path] = namespace, name, path, value, noted
        self._entries: Sequence[tuple[_Namespace, str, tuple[str, ...], Any, Any]] = tuple(found.values())

    def are_as_before(self) -> bool:
        """True if all of them are what they were."""
        for namespace, name, path, value, noted in self._entries:
            now = namespace.get(name, _ABSENT)
            for attribute in path:
                now = getattr(now, attribute, _ABSENT)
            if (now is not value or isinstance(value, _CHANGING)) and _noted(now) != noted:
                return False
        return True

    def __getstate__(self) -> list[tuple[Any, ...]]:
        return [(n.get("__name__"), *entry) for n, *entry in self._entries if isinstance(entry[2], PLAIN)]

    def __setstate__(self, state: list[tuple[Any, ...]]) -> None:
        self._entries = [(vars(sys.modules[module]), *entry) for module, *entry in state if module in sys.modules]


def with_callees(
    codes: Mapping[CodeType, _Namespace], methods: Collection[FunctionType] = ()
) -> dict[CodeType, _Namespace]:
    """Return code, and that of the user's functions that it mentions.

    Args:
        codes: code that is known to have run, with its variables.
        methods: functions that it may mention by their names, or call without if they have none.
    """
    found, last = dict(codes), dict(codes)
    for _ in range(_DEPTH):
        names = frozenset({"<lambda>"}).union(*map(names_in, last))
        mentioned = (namespace.get(name) for code, namespace in last.items() for name in names_in(code))
        functions = [value for value in mentioned if isinstance(value, FunctionType) and is_users(value.__module__)]
        functions += [method for method in methods if method.__name__ in names]
        last = {function.__code__: function.__globals__ for function in functions if function.__code__ not in found}
        found |= last
    return found


def _values(value: Any, names: frozenset[str], depth: int) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield what a value holds, by the attributes that lead there, and as it is compared; only what code mentions."""
    if isinstance(value, ModuleType | nn.Module):
        return
    if (noted := _noted(value)) is not _ABSENT:
        yield (), value, noted
    kind = value if isinstance(value, type) else type(value)
    bases = [vars(base) for base in reversed(kind.__mro__) if is_users_class(base)]
    attributes = {name: item for own in bases for name, item in own.items()}
    if kind is not value:  # whose methods and properties are not what is read off the object
        data = {name: item for name, item in attributes.items() if isinstance(item, (*PLAIN, *CONTAINERS))}
        attributes = {**data, **(attributes_of(value) or {})}
    for name in sorted(names & attributes.keys()) if depth else ():
        for path, item, of_item in _values(attributes[name], names, depth - 1):
            yield (name, *path), item, of_item


def _noted(value: Any) -> Any:
    """Return a value as it is compared: a plain one as a tuple, tensors and functions by what they are."""
    if isinstance(value, Tensor | FunctionType | type):
        return id(value)
    if isinstance(value, ContextVar):
        value = value.get(None)
    return snapshot(value, depth=_DEPTH) if isinstance(value, (*PLAIN, *CONTAINERS)) else _ABSENT
