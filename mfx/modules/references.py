"""The functions that a model's forward may run, by name, and the variables that these refer to."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Collection, Iterator
from functools import _lru_cache_wrapper, lru_cache
from threading import local
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from mfx.modules.holders import Variable

_PYTEST = "_pytest"  # to which every ``assert`` refers that pytest has rewritten
_NOT_USERS = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "mfx", "mfx_passes", "einops", "triton", "networkx", _PYTEST}
)


def is_users(module_name: object) -> bool:
    """True if a module of Python is neither torch's, mfx's nor the standard library's.

    Code that was made from a text has no name; a class of C may have a descriptor there.
    """
    if isinstance(module_name, str):
        return module_name.partition(".")[0] not in _NOT_USERS
    return module_name is None


def is_users_class(cls: type) -> bool:
    """True if a class is neither torch's, mfx's nor the standard library's.

    What makes classes (`dataclasses.make_dataclass`, `types.new_class`) may name its own module as theirs: that of a
    library's class holds it under its name, or holds the function that it was made in.
    """
    name, module = cls.__qualname__, cls.__module__
    if is_users(module):
        return True
    if not cls.__flags__ & _HEAP_TYPE or "<locals>" in name or (table := sys.modules.get(module)) is None:
        return False
    first, *inner = name.split(".")
    found = vars(table).get(first)
    for each in inner:
        found = vars(found).get(each) if isinstance(found, type) else None
    return found is not cls


_HEAP_TYPE = 1 << 9  # Python's flag of the classes that are not made by C code before it starts
_OBJECTS = (SimpleNamespace, local, BaseException, functools.partial)
# The standard library's and torch's modules whose objects are there to hold others.
_OBJECTS_OF = ("weakref", "_weakrefset", "collections", "argparse", "torch.distributions")


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object that the user's code writes into; None for others."""
    cls = type(value)
    if not (isinstance(value, _OBJECTS) or is_users_class(cls) or _holds_others(cls.__module__)):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _holds_others(module_name: object) -> bool:
    return isinstance(module_name, str) and not {module_name, module_name.rpartition(".")[0]}.isdisjoint(_OBJECTS_OF)


def writing_caches(cls: type) -> tuple[Any, ...]:
    """Return the methods of a user's class that keep their results (`functools.lru_cache`), and may write elsewhere."""
    if (known := _writing.get(cls)) is None:
        values = [v for base in cls.__mro__ if is_users_class(base) for v in vars(base).values()]
        caches = [cache for v in values if isinstance(cache := getattr(v, "__func__", v), _lru_cache_wrapper)]
        known = _writing[cls] = tuple(
            cache for cache in caches if any(map(_may_write, _functions_in(cache.__wrapped__)))
        )
    return known


_writing: WeakKeyDictionary[type, tuple[Any, ...]] = WeakKeyDictionary()
_WRITES = {dis.opmap[name] for name in ("STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR")}
_CHANGE = frozenset(
    {"add", "append", "appendleft", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}
)


def _may_write(function: FunctionType) -> bool:
    code = function.__code__
    return not _WRITES.isdisjoint(code.co_code[::2]) or not _CHANGE.isdisjoint(names_in(code))


class References:
    """Follows names through code: from functions to the variables, classes and functions that they mention.

    A method counts as run if any function mentions its name. That is more than what is run, never less, but for what is
    looked up by a computed name.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._classes: dict[type, None] = {}
        self._unmentioned: dict[str, list[Any]] = {}  # methods of these classes, by name
        self._functions: dict[FunctionType, None] = {}
        self._queue: list[FunctionType] = []
        self.caches: dict[Any, None] = {}  # the functions that keep their results

    def add_class(self, cls: type, always: Collection[str] | None) -> Iterator[type]:
        """Take note of a class of the user's, whose methods are run if they are mentioned.

        Args:
            cls: the class.
            always: methods that may run without being mentioned; None for all special ones.

        Yields:
            The class and its bases, as far as they are the user's and new.
        """
        for base in cls.__mro__:
            if base in self._classes or not is_users_class(base):
                continue
            self._classes[base] = None
            for name, value in list(vars(base).items()):
                if name in self._names or (name.startswith("__") if always is None else name in always):
                    self.add(value)
                else:
                    self._unmentioned.setdefault(name, []).append(value)
            yield base

    def add(self, value: Any) -> None:
        """Take note of a function of the user's, however it is wrapped, as one that is run."""
        if isinstance(cache := getattr(value, "__func__", value), _lru_cache_wrapper):
            if is_users(cache.__module__):
                self.caches[cache] = None
            value = inspect.unwrap(cache)
        for function in _functions_in(value):
            if function not in self._functions and is_users(function.__module__):
                self._functions[function] = None
                self._queue.append(function)

    @property
    def functions(self) -> Collection[FunctionType]:
        """The functions that were taken note of."""
        return self._functions.keys()

    @property
    def classes(self) -> Collection[type]:
        """The classes that were taken note of."""
        return self._classes.keys()

    def variables(self) -> Iterator[tuple[str, Any]]:
        """Yield what the functions refer to that were added since the last time: variables, cells, defaults."""
        while self._queue:
            function = self._queue.pop()
            names = names_in(function.__code__)
            new = names - self._names
            self._names |= new
            for name in new & self._unmentioned.keys():
                for value in self._unmentioned.pop(name):
                    self.add(value)
            yield from _variables(function, names)


def _variables(function: FunctionType, names: frozenset[str]) -> Iterator[tuple[str, Any]]:
    variables = function.__globals__
    for name in names & variables.keys():
        value = variables[name]
        if not isinstance(value, ModuleType):
            yield name, value
        elif is_users(value.__name__):
            yield from ((f"{name}.{inner}", Variable(vars(value), inner)) for inner in names & vars(value).keys())
    yield from ((name, Variable(variables, name)) for name in stored_in(function.__code__))
    yield from zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield f"a default of {function.__qualname__}", default
    yield function.__qualname__, function.__dict__


def _functions_in(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType):
        inner = inspect.unwrap(value) if "__wrapped__" in value.__dict__ else value
        if isinstance(inner, FunctionType):
            yield inner
        else:  # a wrapper of C code
            yield value
            yield from _functions_in(inner)
    elif isinstance(value, MethodType | classmethod | staticmethod):
        yield from _functions_in(value.__func__)
    elif isinstance(value, functools.partial):
        yield from _functions_in(value.func)
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if isinstance(f, FunctionType))


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names of variables and attributes in code, that of functions inside of it included."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


def mentioned_in(codes: Collection[CodeType]) -> frozenset[str]:
    """Return the names in code, and the strings there that may be names: ``getattr`` takes these."""
    return frozenset().union(*map(names_in, codes), *map(_strings_in, codes))


@lru_cache(maxsize=4096)
def _strings_in(code: CodeType) -> frozenset[str]:
    found, queue = set(), list(code.co_consts)
    while queue:
        constant = queue.pop()
        if isinstance(constant, tuple | frozenset):
            queue += constant
        elif isinstance(constant, CodeType):
            queue += constant.co_consts
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


@lru_cache(maxsize=4096)
def stored_in(code: CodeType, kind: str = "GLOBAL") -> frozenset[str]:
    """Return the names of global variables that code assigns or deletes; of attributes, if the kind is ``"ATTR"``."""
    inner = [stored_in(constant, kind) for constant in code.co_consts if isinstance(constant, CodeType)]
    operations = f"STORE_{kind}", f"DELETE_{kind}"
    if not any(dis.opmap[operation] in code.co_code[::2] for operation in operations):
        return frozenset[str]().union(*inner)
    stored = (i.argval for i in dis.get_instructions(code) if i.opname in operations)
    return frozenset(stored).union(*inner)
