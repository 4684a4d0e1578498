"""The layout of a step's state: the tables in which the modules that it reads keep what they have."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from mfx.compat import Table, call_tables, global_call_tables, tensor_tables
from mfx.engine.recompute.contents import LIMIT, Buffer, Held, held_by, sharing, sign_of
from mfx.engine.recompute.tables import TensorSlot, is_watched, set_contents, set_types, table_of, unless_sharded
from mfx.modules.buffers import is_buffer
from mfx.modules.overlay import Overlay
from mfx.modules.random_state import generators_of
from mfx_passes.errors import MfxError

Flags = tuple[bool, ...]

_END = object()
_values_of = methodcaller("values")
_look = methodcaller("look")
_call: Any = partial.__call__  # at C speed in map
_OWN = frozenset(vars(nn.Module()))  # attributes that every module has; all but ``training`` are tables
_OPAQUE = (nn.Module, type, Overlay)
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size})


class StateLayout:
    """The tables under a step's targets, and what they held when this was made.

    Tables are dictionaries: a module's attributes, parameters, buffers, modules and hooks, and the attributes of
    objects that modules hold. They are compared by identity, and written into. Containers and tensors in them are
    compared, too; what replaces them for a recomputation is a copy.

    Parameters and buffers are not held but read, by ``tensors``. So a layout can be kept from call to call as long as
    it ``holds``, if it ``lasts``.

    Attributes:
        modules: all modules, each once.
        slots: the places of all tensors, in the order of ``tensors``.
        loose: the tensors that are neither parameters nor buffers of a module.
        lasts: False if there are loose tensors, which should live no longer than the model wants, or buffers in a root
            that is made anew for every call.
        large: containers and buffers that are not copied, by label: too large, or memory that something shares.
        generators: the random generators that the modules hold.
        has_hooks: True if a module has forward hooks.
        hooked: the classes of modules that have hooks around both their forward and their backward.
        has_state: True if there is a tensor that is not a parameter.
        has_mutable: True if there is something that a branch may change in place, without an assignment.
    """

    def __init__(self, root: Any, targets: Sequence[str], step_path: str) -> None:
        self._step_path = step_path
        self.modules: list[nn.Module] = []
        self.slots: list[TensorSlot] = []
        self.loose: list[Tensor] = []
        self.large: dict[str, Any] = {}
        self.lasts = True
        self._seen: set[Any] = set()  # identities
        self._tables: list[Table] = []
        self._tensor_tables: list[Table] = []
        self._empty: list[Table] = []
        self._paths: list[tuple[Table, str]] = []  # on the way to what is no tensor
        self._leaves: list[tuple[Table, str]] = []  # tensors that are targets themselves
        self._mutable: list[tuple[Table, Any, Any]] = []
        self._contents: dict[int, Held] = {}
        self._buffers: dict[str, Buffer] = {}
        tensor_slots: list[TensorSlot] = []
        self._loose_slots: list[TensorSlot] = []
        for table in global_call_tables():
            self._add_table(table)
        names = dict.fromkeys(target.partition(".")[0] for target in targets if target)
        self._tops = attrgetter("__class__", "__class__", *names)  # of two names at least it returns a tuple
        try:
            for target in targets:
                self._follow(root, target, tensor_slots)
        except AttributeError as error:
            raise MfxError(f"step {step_path} reads what the model no longer has: {error}") from error
        self.slots += [*tensor_slots, *self._loose_slots]
        self.has_hooks = any(module._forward_hooks for module in self.modules)
        self.hooked = {
            type(m).__name__ for m in self.modules if m._forward_hooks and (m._backward_hooks or m._backward_pre_hooks)
        }
        self.has_state = not all(slot.is_parameter for slot in self.slots)
        self.generators = [generator for module in self.modules for generator in generators_of(module, step_path)]
        self.has_mutable = bool(self._mutable)
        self.lasts = self.lasts and all(isinstance(tensor, nn.Parameter) for tensor in self.loose)
        self._types = list(map(type, self.modules))
        self._named = [*self._tables, *self._tensor_tables]
        self._names = [*map(list, self._named)]
        self._top_values = self._tops(root)
        self._read_paths = [partial(table.get, name) for table, name in self._paths]
        self._read_leaves = [partial(table.get, name) for table, name in self._leaves]
        if self._buffers:
            self._watch_shared()
        self._held = [*self._look(), _END]

    # --- what there is ------------------------------------------------------------------------------------------------

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
                is_parameter = isinstance(value, nn.Parameter) or table is getattr(holder, "_parameters", None)
                leaves.append(TensorSlot(table, name, target, is_parameter))
        if isinstance(value, nn.Module):
            self._walk(value, target)

    def _walk(self, module: nn.Module, path: str) -> None:
        if self._saw(module):
            return
        self.modules.append(module)
        self._add_table(module.__dict__)
        for name in module.__dict__.keys() - _OWN:
            self._look_at(module.__dict__, name, f"{path}.{name}", deep=True)
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

    def _look_at(self, table: Table, name: Any, label: str, *, deep: bool) -> None:
        """Note an attribute that is or holds something that can change in place."""
        value = table[name]
        if type(value) in _PLAIN or isinstance(value, _OPAQUE):
            return
        if self._is_mutable(value, label, table):
            self._mutable.append((table, name, value))
        elif deep and is_watched(type(value)) and not self._saw(value):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict) and len(attributes) <= LIMIT:
                self._add_table(attributes)
                for inner in attributes:
                    self._look_at(attributes, inner, f"{label}.{inner}", deep=False)

    def _is_mutable(self, value: Any, label: str, table: Table) -> bool:
        """True for a tensor, and for a container that can change, or that has something in it that can; it is noted."""
        if isinstance(value, Tensor):
            if not self._saw(value):
                self.loose.append(value)
                self._loose_slots.append(TensorSlot(table, "", label, isinstance(value, nn.Parameter)))
            return True
        if not (isinstance(value, list | dict | set | deque | tuple) or is_buffer(value)):
            return False
        if id(value) in self._contents:
            return True
        held = held_by(value)
        if held is None:
            self.large[label] = value
            return False
        self._contents[id(value)] = held
        if isinstance(held, Buffer):
            self._buffers[label] = held
            return True
        entries = [(key, entry) for key, entry in held.named() if type(entry) not in _PLAIN]
        inside = [self._is_mutable(entry, f"{label}[{key!r}]", table) for key, entry in entries]
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

    # --- what they hold -----------------------------------------------------------------------------------------------

    @property
    def flags(self) -> Flags:
        """The training mode of each module."""
        return tuple([m.training for m in self.modules])

    def signs(self) -> list[tuple[Any, ...]]:
        """Return what tells changes of what is not copied, in the order of ``large``."""
        return [sign_of(value) for value in self.large.values()]

    def tensors(self) -> list[Any]:
        """Return the tensors of all slots, each a tensor or None; parameters and buffers are the present ones."""
        now = chain.from_iterable(map(_values_of, self._tensor_tables))
        return [*now, *map(_call, self._read_leaves), *self.loose]

    def fits(self, root: Any) -> bool:
        """True if this is the layout for a root, and ``holds``."""
        try:
            return all(map(is_, self._tops(root), self._top_values)) and self.holds()
        except AttributeError:
            return False

    def holds(self) -> bool:
        """True if all tables hold the same, parameters and buffers aside, but under the same names."""
        return (
            not any(self._empty)
            and [*map(list, self._named)] == self._names
            and all(map(is_, chain(self._look(), (_END,)), self._held))
            and all(map(is_, map(type, self.modules), self._types))
        )

    def _look(self) -> Iterator[Any]:
        """Yield, at C speed, all that the tables and containers hold, parameters and buffers aside."""
        found = chain(map(_call, self._read_paths), chain.from_iterable(map(_values_of, self._tables)))
        return chain(found, chain.from_iterable(map(_look, self._contents.values()))) if self._contents else found

    # --- and held -----------------------------------------------------------------------------------------------------

    def put_back(self, tensors: Sequence[Any], values: Mapping[int, Tensor]) -> PutBack:
        """Return a context in which everything is as it was when this was made; it leaves all as it was found.

        Args:
            tensors: what ``tensors`` returned then.
            values: the values to put in the place of tensors, by identity.
        """
        return PutBack(self, tensors, values)

    def is_put_back(self, tensors: Sequence[Any]) -> bool:
        """True if all tables hold what they held when this was made, and these tensors."""
        return self.holds() and all(map(is_, self.tensors(), tensors))

    def written(self) -> list[tuple[Table, dict[Any, Any]]]:
        """Return the tables that ``write`` may write into, each with what it holds now."""
        alone = (table for table, _ in (*self._paths, *self._leaves))
        return [(table, dict(table)) for table in chain(self._named, self._empty, alone)]

    def write(self, tensors: Sequence[Any], values: Mapping[int, Tensor]) -> None:
        """Put everything back, as ``put_back`` says."""
        held, present = iter(self._held), iter(tensors)
        for table, name in self._paths:
            table[name] = next(held)
        names = iter(self._names)
        for table in self._tables:
            set_contents(table, {name: next(held) for name in next(names)})
        for table in self._tensor_tables:
            set_contents(table, {name: unless_sharded(table, name, next(present)) for name in next(names)}, values)
        for table, name in self._leaves:
            value = unless_sharded(table, name, next(present))
            table[name] = values.get(id(value), value)
        for table in self._empty:
            table.clear()
        copies: dict[int, Any] = dict(values)
        for table, name, value in self._mutable:
            table[name] = self._copied(value, copies)
        for module in set_types(self.modules, self._types):
            parametrized: Any = module._modules.get("parametrizations") or ()
            for name in parametrized:
                if not hasattr(type(module), name):
                    raise MfxError(
                        f"{self._step_path}: the parametrization of {name} in a {type(module).__mro__[1].__name__} was "
                        "removed between forward and backward, but the backward pass has to run this step a second "
                        "time; call backward before removing it"
                    )

    def _copied(self, value: Any, copies: dict[int, Any]) -> Any:
        """Return a container or buffer as it was, copied with the containers in it."""
        held = self._contents.get(id(value))
        if id(value) in copies or held is None:
            return copies.get(id(value), value)
        if (copied := held.empty()) is not None:
            copies[id(value)] = copied
        return copies.setdefault(id(value), held.filled(copied, partial(self._copied, copies=copies)))


class PutBack:
    """A context in which all that a layout knows of is as it was; where nothing differs it only looks.

    Other threads see it, too. There is no lock: a forward pass that holds one, and runs a backward pass of its own, may
    wait for a device's thread that waits for it.
    See `StateLayout.put_back`.
    """

    __slots__ = ("_found", "_layout", "_tensors", "_types", "_values")

    def __init__(self, layout: StateLayout, tensors: Sequence[Any], values: Mapping[int, Tensor]) -> None:
        self._layout, self._tensors, self._values = layout, tensors, values
        self._found: list[tuple[Table, dict[Any, Any]]] | None = None

    def __enter__(self) -> None:
        layout = self._layout
        self._types = list(map(type, layout.modules))
        if self._values or layout.has_mutable or not layout.is_put_back(self._tensors):
            self._found = layout.written()
            try:
                layout.write(self._tensors, self._values)
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *raised: object) -> None:
        layout = self._layout
        if self._found is not None:
            for table, contents in self._found:
                set_contents(table, contents)
            set_types(layout.modules, self._types)
        elif not layout.is_put_back(self._tensors):
            layout.write(self._tensors, {})
