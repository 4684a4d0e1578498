"""The Python state that a model's forward may change: noted before a trace, compared and put back after it."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import _lru_cache_wrapper, partial
from io import IOBase
from threading import Thread
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary
from weakref import ref as weakref

import torch
from torch import Tensor, nn

from mfx.compat import hook_tables
from mfx.modules.holders import ABSENT, DICT, VARIABLE, Holder, Variable, holder_of, items, same
from mfx.modules.references import References, attributes_of, is_users_class, names_in
from mfx_passes import paths

_DEPTH = 5  # a list in a dict in an object that an object in an attribute refers to
_MANY = 256  # entries of a container that is looked into; a larger one is compared, too, but not what it holds
_INTERNAL = frozenset(nn.Module().__dict__)
_NOTHING_INSIDE = {bool, int, float, complex, str, bytes, type(None), Tensor, nn.Parameter, torch.dtype, torch.device}
_WEAK = ("weakref", "_weakref", "_weakrefset")
_WEAK_CONTAINERS = (WeakKeyDictionary, WeakSet, WeakValueDictionary)
_RUN = ("forward", "__call__", "__getattr__", "__setattr__")  # methods of a module that may run unmentioned


class PythonState:
    """The values that the modules of a model, and the variables that its forward refers to, hold at this moment.

    Tensors are not looked into, nor are parameters, buffers and submodules: these may be initialized by a first call.

    Args:
        model: the model.

    Attributes:
        assigned: names of the attributes, by module, that were changed when all was put back, or lead to what was.
        outside: the names of what was changed and no attribute leads to.
        iterators: the iterators among the values, by identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self.assigned: dict[nn.Module, set[str]] = {}
        self.outside: list[str] = []
        self.iterators: dict[int, Any] = {}
        self._modules = {module: path for path, module in model.named_modules()}
        self._seen: dict[int, Any] = {id(module): module for module in self._modules}
        self._holders: list[Holder] = []
        self._tensors: list[Tensor] = []
        self._references = References()
        # TorchScript's modules note there which of their methods were looked up; their state lies in C++.
        self._tables = [(m, dict(m.__dict__)) for m in self._modules if not isinstance(m, torch.jit.ScriptModule)]
        self._hooks = [
            (table, (*table, *table.values()) if table else (), path)
            for module, path in self._modules.items()
            for table in hook_tables(module)
        ]
        for cls in {type(module): None for module in self._modules}:
            self._note_class(cls)
        for module, path in self._modules.items():
            if not is_users_class(type(module)):
                continue  # nothing of torch's notes anything in a container
            for name in module.__dict__.keys() - _INTERNAL:
                if type(value := module.__dict__[name]) not in _NOTHING_INSIDE:
                    self._note(value, paths.join(path, name), _DEPTH)
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.__dict__:
                self._holders.append(Holder(tensor.__dict__, DICT, path))
        for table, _, path in self._hooks:
            for hook in table.values():
                self._note(hook, f"a hook of {path or 'the model'}", _DEPTH)
        for name, value in self._references.variables():
            self._note(value, name, _DEPTH)

    @property
    def caches(self) -> Collection[Any]:
        """The functions that a forward may call and that keep their results (`functools.lru_cache`)."""
        return self._references.caches.keys()

    @property
    def classes(self) -> Collection[type]:
        """The user's classes whose methods a forward may call."""
        return self._references.classes

    @property
    def functions(self) -> Collection[FunctionType]:
        """The functions that a forward may call."""
        return self._references.functions

    @property
    def refers_weakly(self) -> bool:
        """True if a container of weak references is among the values, or a function that may run makes such."""
        held = any(isinstance(value, _WEAK_CONTAINERS) for value in self._seen.values())
        return held or any(map(_names_weak_references, self._references.functions))

    def holders(self) -> list[Holder]:
        """Return all that holds values, modules too."""
        return [*(Holder(module.__dict__, DICT, path) for module, path in self._modules.items()), *self._holders]

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the values, but parameters and buffers."""
        attributes = [value for _, table in self._tables for value in table.values() if isinstance(value, Tensor)]
        return [*attributes, *self._tensors]

    def changes(self) -> list[Holder]:
        """Return what holds other values than before; of a module, its attributes one by one."""
        hooks = [
            Holder(table, DICT, f"the hooks of {path or 'the model'}", before)
            for table, before, path in self._hooks
            if 2 * len(table) != len(before) or (before and not same(before, (*table, *table.values())))
        ]
        return [*self._changed_attributes(), *hooks, *(holder for holder in self._holders if holder.changed())]

    def is_current(self, model: nn.Module) -> bool:
        """True if the model has the same modules, all hold what they held, and nothing was ever put back."""
        if self.assigned or self.outside or list(self._modules.items()) != [(m, p) for p, m in model.named_modules()]:
            return False
        return not self.changes()

    def put_back(self) -> list[Holder]:
        """Have all hold what they held, hook tables too, and return what had changed.

        All or nothing: a model that notes in an attribute that its hooks are there would add them twice.
        """
        changes = self.changes()
        for holder in changes:
            owners = self.owners(holder.value)
            for module, names in owners.items():
                self.assigned.setdefault(module, set()).update(names - _INTERNAL)
            if not owners:
                self.outside.append(holder.name)
        for holder in changes:
            holder.put_back()
        return changes

    def owners(self, value: Any) -> dict[nn.Module, set[str]]:
        """Return the modules whose attributes lead to the value of a holder, or to a tensor, and these attributes."""
        found: dict[nn.Module, set[str]] = {}
        if isinstance(value, type):
            return found  # others have it, too
        for module, table in self._tables:
            if isinstance(value, Variable):
                names = {value.name} if value.namespace is module.__dict__ else set()
            else:
                own = {**table, **module.__dict__}
                names = {n for n in own.keys() - _INTERNAL if _leads_to(own[n], value, _DEPTH)}
                names |= {n for n in _INTERNAL if own.get(n) is value}  # a table of hooks
            if names:
                found[module] = names
        return found

    def path_of(self, module: nn.Module) -> str:
        """Return the path of a module in the model."""
        return str(self._modules[module])

    def _changed_attributes(self) -> Iterator[Holder]:
        for module, old in self._tables:
            now = module.__dict__
            if len(now) == len(old) and same(tuple(now.values()), tuple(old.values())):
                continue
            for name in {**old, **now}:
                before = (old.get(name, ABSENT),)
                if not same(before, (now.get(name, ABSENT),)):
                    path = paths.join(self._modules[module], name)
                    yield Holder(Variable(now, name), VARIABLE, path, before)

    def _note_class(self, cls: type) -> None:
        for base in self._references.add_class(cls, _RUN if issubclass(cls, nn.Module) else None):
            self._note_held(base, base.__qualname__, _DEPTH)

    def _note(self, value: Any, name: str, depth: int) -> None:
        if type(value) in _NOTHING_INSIDE or id(value) in self._seen or not depth:
            if isinstance(value, Tensor):
                self._tensors.append(value)
            return
        if isinstance(value, FunctionType | MethodType | _lru_cache_wrapper):
            self._references.add(value)
            if isinstance(value, MethodType):
                self._note(value.__self__, f"{name}.__self__", depth)
        elif isinstance(value, type):
            if is_users_class(value) and not issubclass(value, enum.Enum | nn.Module):
                self._note_class(value)
        elif not isinstance(value, ModuleType | Tensor | enum.Enum):
            self._note_held(value, name, depth)

    def _note_held(self, value: Any, name: str, depth: int) -> None:
        self._seen[id(value)] = value
        if is_iterator(value):
            self.iterators[id(value)] = value
        if (holder := holder_of(value, name)) is not None:
            self._holders.append(holder)
        if (attributes := _attributes(value)) is not None:
            self._holders.append(Holder(attributes, DICT, name))
            self._note_class(type(value))
        for suffix, item in _inside(value):
            self._note(item, name + suffix, depth - 1)


_noted: ContextVar[dict[nn.Module, PythonState] | None] = ContextVar("noted", default=None)


@contextmanager
def states_noted_once() -> Iterator[None]:
    """Within this context, `state_of` notes the state of a model only where it differs from when it was noted last."""
    token = _noted.set({} if _noted.get() is None else _noted.get())
    try:
        yield
    finally:
        _noted.reset(token)


def state_of(model: nn.Module) -> PythonState:
    """Return the Python state of a model at this moment."""
    noted = _noted.get()
    if noted is None:
        return PythonState(model)
    if (state := noted.get(model)) is None or not state.is_current(model):
        noted[model] = state = PythonState(model)
    return state


@contextmanager
def python_state_restored(model: nn.Module) -> Iterator[PythonState]:
    """Put back, at the end of this context, the Python state that is changed in it."""
    state = state_of(model)
    try:
        yield state
    finally:
        state.put_back()


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a container or object holds, each with what follows its name in an expression."""
    yield from items(value, _MANY)
    if isinstance(value, MethodType | weakref):
        yield "", value.__self__ if isinstance(value, MethodType) else value()
    if isinstance(value, partial):
        yield from (("", item) for item in (value.func, *value.args, *value.keywords.values()))
    if (attributes := _attributes(value)) is not None:
        yield from ((f".{name}", item) for name, item in list(attributes.items()))


def _names_weak_references(function: FunctionType) -> bool:
    names, variables = names_in(function.__code__), function.__globals__
    values = (variables[name] for name in names & variables.keys())
    return "weakref" in names or any(getattr(value, "__module__", None) in _WEAK for value in values)


def _attributes(value: Any) -> dict[str, Any] | None:
    if isinstance(value, Thread):
        return None  # its own code changes them at any time, a progress bar's for instance: this is no model's doing
    return value.__dict__ if isinstance(value, nn.Module) else attributes_of(value)


def is_iterator(value: Any) -> bool:
    """True for iterators of Python's: objects that are used up, and hold no attributes."""
    return isinstance(value, Iterator) and attributes_of(value) is None and not isinstance(value, IOBase)


def _leads_to(value: Any, end: Any, depth: int) -> bool:
    if value is end or _attributes(value) is end:
        return True
    if type(value) in _NOTHING_INSIDE or isinstance(value, ModuleType | Tensor | type | nn.Module) or not depth:
        return False
    return any(_leads_to(item, end, depth - 1) for _, item in _inside(value))
