"""The state that the modules of a step hold: found once, in tables that can be compared and written into."""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mfx.compat import Table, call_tables, tensor_tables
from mfx.engine.recompute.contents import LIMIT, Buffer, Held, held_by, sharing
from mfx.engine.recompute.tables import TensorSlot, table_of, tables_before, tables_in
from mfx.modules.buffers import is_buffer
from mfx.modules.overlay import Overlay
from mfx.modules.python_state import is_iterator
from mfx.modules.references import is_users_class, writing_caches

_OWN = frozenset(vars(nn.Module()))  # attributes that every module has; all but ``training`` are tables
_DEPTH = 3  # of objects in objects
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})


class State:
    """The tables and tensors that modules hold, and containers, objects and other tensors in their attributes.

    Args:
        root: the object under which a step reads by path.

    Attributes:
        modules: all modules, each once.
        slots: the places of all tensors, in the order of ``tensors``.
        loose: the tensors that are neither parameters nor buffers of a module.
        lasts: False if there are loose tensors, which should live no longer than the model wants, or buffers in a root
            that is made anew for every call.
        large: what is not copied, by label: containers and buffers that are too large, memory that something shares,
            iterators.
        caches: the methods that keep their results and may write, whose calls differ when they are made again.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self.modules: list[nn.Module] = []
        self.slots: list[TensorSlot] = []
        self.loose: list[Tensor] = []
        self.large: dict[str, Any] = {}
        self.caches: dict[Any, None] = {}
        self.lasts = True
        self._seen: set[Any] = set()  # identities
        self._tables: list[Table] = []
        self._tensor_tables: list[Table] = []
        self._empty: list[Table] = []
        self._paths: list[tuple[Table, str]] = []  # on the way to what is no tensor
        self._leaves: list[tuple[Table, str]] = []  # tensors that are targets themselves
        self._holders: list[nn.Module] = []  # of such tensors
        self._absent: list[tuple[Table, str]] = []  # places that Python would look them up in first
        self._mutable: list[tuple[Table, Any, Any]] = []
        self._contents: dict[int, Held] = {}
        self._buffers: dict[str, Buffer] = {}
        self._loose_slots: list[TensorSlot] = []

    def tensors(self) -> list[Any]:
        """Return the present tensors."""
        raise NotImplementedError

    def _follow(self, root: Any, target: str, leaves: list[TensorSlot]) -> None:
        """Note the tables on the way to a target, and what is in it."""
        value = root
        for name in target.split(".") if target else ():
            holder, table = value, table_of(value, name)
            value = getattr(holder, name) if table is None else table[name]
            if table is None:
                continue
            if holder is root and not isinstance(root, nn.Module):
                # It is made anew for every call, and does not change; but a buffer in it may.
                if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
                    continue
                self.lasts = False
            if not isinstance(value, Tensor):
                self._paths.append((table, name))
            elif self._seen.isdisjoint({id(table), (id(table), name)}):
                self._seen.add((id(table), name))
                self._leaves.append((table, name))
                if isinstance(holder, nn.Module):
                    self._holders.append(holder)
                    self._absent += [(other, name) for other in tables_before(holder, table)]
                is_parameter = isinstance(value, nn.Parameter) or table is getattr(holder, "_parameters", None)
                leaves.append(TensorSlot(table, name, target, is_parameter))
        if isinstance(value, nn.Module):
            self._walk(value, target)

    def _walk(self, module: nn.Module, path: str) -> None:
        if self._saw(module):
            return
        self.modules.append(module)
        self.caches.update(dict.fromkeys(writing_caches(type(module))))
        self._add_table(module.__dict__)
        for name in module.__dict__.keys() - _OWN:
            self._look_at(module.__dict__, name, f"{path}.{name}", _DEPTH)
        for table, is_parameter in zip(tensor_tables(module), (True, False), strict=True):
            self.slots += [TensorSlot(table, name, f"{path}.{name}", is_parameter) for name in table]
            self._add_table(table, self._tensor_tables)
        if isinstance(module._modules, dict):  # else it is a scripted module, whose modules cannot be replaced
            self._add_table(module._modules)
            for hooks in call_tables(module):
                self._add_table(hooks)
        for name, child in module._modules.items():
            if child is not None:
                self._walk(child, f"{path}.{name}")

    def _saw(self, thing: object) -> bool:
        seen = id(thing) in self._seen
        self._seen.add(id(thing))
        return seen

    def _add_table(self, table: Table, tables: list[Table] | None = None) -> None:
        self._seen.add(id(table))
        (self._empty if not table else self._tables if tables is None else tables).append(table)

    def _look_at(self, table: Table, name: Any, label: str, depth: int) -> None:
        """Note an attribute that is or holds something that can change in place."""
        value = table[name]
        if type(value) not in _PLAIN and self._is_replaced(value, label, table, depth):
            self._mutable.append((table, name, value))

    def _enter(self, value: Any, label: str, depth: int) -> None:
        """Note the attributes of an object, what functions were made of, and a module that is not of the model's."""
        if not depth or isinstance(value, type | Overlay) or self._saw(value):
            return
        if isinstance(value, nn.Module):
            if self._is_outside(value):
                self._seen.remove(id(value))
                self._walk(value, label)
        elif isinstance(value, MethodType | weakref.ref):
            self._enter(value.__self__ if isinstance(value, MethodType) else value(), label, depth)
        elif isinstance(value, partial):
            for position, argument in enumerate((*value.args, *value.keywords.values())):
                if isinstance(argument, list | dict | set | deque) or is_buffer(argument):
                    self.large[f"{label}, argument {position},"] = argument  # nothing can be put in its place
                else:
                    self._enter(argument, label, depth)
        elif is_iterator(value):
            self.large[label] = value
        self.caches.update(dict.fromkeys(writing_caches(type(value))))
        for attributes in tables_in(value):
            self._add_attributes(attributes, label, depth)

    def _add_attributes(self, attributes: Table, label: str, depth: int) -> None:
        if len(attributes) <= LIMIT:
            self._add_table(attributes)
            for name in attributes:
                self._look_at(attributes, name, f"{label}.{name}", depth - 1)

    def _is_outside(self, module: nn.Module) -> bool:
        """True for a module that an attribute holds which is not registered: neither in the model nor around it."""
        try:
            own = set(self._root.modules())
        except AttributeError:
            return False
        return module not in own and own.isdisjoint(module.modules())

    def _is_replaced(self, value: Any, label: str, table: Table, depth: int) -> bool:
        """True for a tensor, and for a container that can change, or that has something in it that can.

        It is noted, and a copy of it takes its place when the step runs again. Of other values, what they refer to is
        noted.
        """
        if isinstance(value, Tensor):
            if not self._saw(value):
                self.loose.append(value)
                self._loose_slots.append(TensorSlot(table, "", label, isinstance(value, nn.Parameter)))
                if value.__dict__:
                    self._add_attributes(value.__dict__, label, depth)
            return True
        if not (isinstance(value, list | dict | set | deque | tuple) or is_buffer(value)):
            self._enter(value, label, depth)
            return False
        if id(value) in self._contents:
            return True
        if is_users_class(type(value)):
            self._enter(value, label, depth)  # which may have attributes, too
        held = held_by(value)
        if held is None:
            self.large[label] = value
            return False
        self._contents[id(value)] = held
        if isinstance(held, Buffer):
            self._buffers[label] = held
            return True
        entries = [(key, entry) for key, entry in held.named() if type(entry) not in _PLAIN]
        inside = [self._is_replaced(entry, f"{label}[{key!r}]", table, depth) for key, entry in entries]
        if isinstance(value, tuple) and not any(inside):
            del self._contents[id(value)]
            return False
        return True

    def _watch_shared(self) -> None:
        """Count buffers whose memory is shared among those that are not copied."""
        shared = sharing([*self._buffers.values()], self.tensors())
        for label, buffer in self._buffers.items():
            if id(buffer.value) in shared:
                self.large[label] = buffer.value
                del self._contents[id(buffer.value)]
