"""The layout of a step's state: the tables in which the modules that it reads keep what they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

from torch import Tensor, nn

from mfx.compat import Table, global_call_tables, version_reader, without_closed_observers
from mfx.engine.recompute.contents import sign_of
from mfx.engine.recompute.state import State
from mfx.engine.recompute.tables import (
    TensorSlot,
    dict_of,
    set_contents,
    set_dicts,
    set_types,
    table_of,
    unless_sharded,
)
from mfx.modules.random_state import generators_of
from mfx_passes.errors import MfxError

Flags = tuple[bool, ...]

_END = object()
_NOTHING_SEEN = object()
_values_of = methodcaller("values")
_own_dict = attrgetter("__dict__")
_look = methodcaller("look")
_call: Any = partial.__call__  # at C speed in map


class StateLayout(State):
    """The tables under a step's targets, and what they held when this was made.

    Tables are dictionaries: a module's attributes, parameters, buffers, modules and hooks, and the attributes of
    objects that modules hold. What is in them is compared by identity, if their versions tell that something was
    written, and written into. Containers and tensors in them are compared, too; what replaces them for a recomputation
    is a copy.

    Parameters and buffers are not held but read, by ``tensors``. So a layout can be kept from call to call as long as
    it ``holds``, if it ``lasts``.

    Attributes:
        generators: the random generators that the modules hold.
        has_hooks: True if a module has forward hooks.
        typed: the modules and objects whose classes are put back.
        owners: those of them whose ``__dict__`` is put back.
        hooked: the classes of modules that have hooks around both their forward and their backward.
        has_state: True if there is a tensor that is not a parameter.
        has_mutable: True if there is something that a branch may change in place, without an assignment.
        seen: what told writes when all was last found to hold the same.
    """

    def __init__(self, root: Any, targets: Sequence[str], step_path: str) -> None:
        super().__init__(root)
        self._step_path = step_path
        tensor_slots: list[TensorSlot] = []
        for table in global_call_tables():
            self._add_table(table)
        self._global = set(map(id, global_call_tables()))
        names = dict.fromkeys(target.partition(".")[0] for target in targets if target) or ["__class__"]
        self._tops = attrgetter(*names, *names)  # of two names at least it returns a tuple
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
        self.typed = [*self.modules, *self._holders]
        self._types = list(map(type, self.typed))
        self.owners = [holder for holder in self.typed if dict_of(holder) is not None]
        self._dicts = list(map(_own_dict, self.owners))
        self._named = [*self._tables, *self._tensor_tables]
        self._names = [*map(list, self._named)]
        self._top_values = self._tops(root)
        self._read_paths = [partial(table.get, name) for table, name in self._paths]
        self._read_leaves = [partial(table.get, name) for table, name in self._leaves]
        if self._buffers:
            self._watch_shared()
        tables = [*self._named, *(table for table, _ in (*self._paths, *self._leaves))]
        self._versions = version_reader([*{id(table): table for table in tables}.values()], self.typed)
        self._has_others = bool(self._absent or self._contents)
        self._held, self._inside = [*self._look()], [*self._look_inside()]
        self.seen: object = _NOTHING_SEEN
        del self._root

    # --- what they hold -----------------------------------------------------------------------------------------------

    @property
    def flags(self) -> Flags:
        """The training mode of each module."""
        return tuple([m.training for m in self.modules])

    def signs(self) -> list[tuple[Any, ...]]:
        """Return what tells changes of what is not copied, in the order of ``large``."""
        return [sign_of(value) for value in self.large.values()]

    def misses(self) -> list[int]:
        """Return how often each of ``caches`` has computed a result."""
        return [cache.cache_info().misses for cache in self.caches]

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
        now = self._versions()  # before the tables are looked at: another thread may write meanwhile
        if now != self.seen:
            if not self._tables_hold():
                return False
            self.seen = now
        return self._others_hold()

    def _tables_hold(self) -> bool:
        """True if the tables hold the same, and modules have their classes and dictionaries."""
        return (
            [*map(list, self._named)] == self._names
            and all(map(is_, self._look(), self._held))
            and [*map(type, self.typed)] == self._types
            and all(map(is_, map(_own_dict, self.owners), self._dicts))
        )

    def _others_hold(self) -> bool:
        """True if empty tables, empty places and containers hold the same."""
        return not any(self._empty) and (not self._has_others or (self._are_absent() and self._contents_hold()))

    def _are_absent(self) -> bool:
        return not any(name in table for table, name in self._absent)

    def _contents_hold(self) -> bool:
        return all(map(is_, self._look_inside(), self._inside))

    def _look(self) -> Iterator[Any]:
        """Yield, at C speed, all that the tables hold, parameters and buffers aside."""
        tables = chain.from_iterable(map(_values_of, self._tables))
        return chain(map(_call, self._read_paths), tables, (_END,))

    def _look_inside(self) -> Iterator[Any]:
        """Yield, at C speed, all that the containers hold."""
        return chain(chain.from_iterable(map(_look, self._contents.values())), (_END,))

    # --- and held -----------------------------------------------------------------------------------------------------

    def is_put_back(self, tensors: Sequence[Any], versions: object) -> bool:
        """True if all tables hold what they held when this was made, and these tensors, as at ``versions``."""
        if self._versions() == versions:
            return self._others_hold()
        return self._tables_hold() and self._others_hold() and all(map(is_, self.tensors(), tensors))

    def holding(self, values: Mapping[int, Tensor]) -> list[tuple[Table, dict[Any, Any]]]:
        """Return the tables that hold a tensor of these identities, each with what it holds now."""
        tables = chain(self._tensor_tables, (table for table, _ in self._leaves))
        return [(table, dict(table)) for table in tables if not values.keys().isdisjoint(map(id, table.values()))]

    def written(self) -> list[tuple[Table, dict[Any, Any]]]:
        """Return the tables that ``write`` may write into, each with what it holds now."""
        alone = (table for table, _ in (*self._paths, *self._leaves, *self._absent))
        return [(table, dict(table)) for table in chain(self._named, self._empty, alone)]

    def write(self, tensors: Sequence[Any], values: Mapping[int, Tensor]) -> None:
        """Put everything back, as `mfx.engine.recompute.put_back.PutBack` says."""
        set_dicts(self.owners, self._dicts)
        held, present = iter(self._held), iter(tensors)
        for table, name in self._paths:
            table[name] = next(held)
        names = iter(self._names)
        for table in self._tables:
            contents = {name: next(held) for name in next(names)}
            set_contents(table, without_closed_observers(contents, table) if id(table) in self._global else contents)
        for table in self._tensor_tables:
            set_contents(table, {name: unless_sharded(table, name, next(present)) for name in next(names)}, values)
        for table, name in self._leaves:
            value = unless_sharded(table, name, next(present))
            table[name] = values.get(id(value), value)
        for table, name in self._absent:
            table.pop(name, None)
        for table in self._empty:
            table.clear()
        copies: dict[int, Any] = dict(values)
        for table, name, value in self._mutable:
            table[name] = self._copied(value, copies)
        for module in set_types(self.typed, self._types):
            parametrized: Any = module._modules.get("parametrizations") or ()
            for name in parametrized:
                if not hasattr(type(module), name) and table_of(module, name) is None:
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
