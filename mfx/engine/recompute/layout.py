"""The layout of a step's state: the modules, parameters and buffers that it reads through its root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

from torch import Tensor, nn

from mfx.compat import Table, tensor_tables
from mfx.modules.random_state import generators_of
from mfx_passes.errors import MfxError
from mfx_passes.paths import resolve

Flags = tuple[bool, ...]
_values_of = methodcaller("values")


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


class StateLayout:
    """The modules and tensor slots under a step's targets.

    It holds no tensors, so it can be kept from call to call, as long as it ``holds``.

    Attributes:
        modules: all modules, each once.
        changing: labels of the slots whose tensors the step changes, by the modules' training flags, once known.
        generators: the random generators that the modules hold.
        has_buffers: True if any slot is not a module's parameter.
    """

    def __init__(self, root: Any, targets: Sequence[str], step_path: str) -> None:
        self._step_path = step_path
        self._get = _getter(targets)
        self.modules: list[nn.Module] = []
        self.changing: dict[Flags, frozenset[str]] = {}
        self._slots: list[TensorSlot] = []
        self._loose: list[str] = []
        self._targeted: list[nn.Module | None] = []
        for target, value in zip(targets, self._values(root), strict=True):
            self._targeted.append(value if isinstance(value, nn.Module) else None)
            if isinstance(value, nn.Module):
                self._slots.extend(self._inside(value, target))
            elif isinstance(value, Tensor):
                self._loose.append(target)
        # In the order of the slots: the values of the tables are the tensors of the slots.
        self._tensor_tables: list[Table] = [table for m in self.modules for table in tensor_tables(m)]
        self.has_buffers = bool(self._loose) or not all(slot.is_parameter for slot in self._slots)
        self._names = list(map(tuple, self._tensor_tables))
        self._module_tables = [m._modules for m in self.modules]
        self._children = self._children_now()
        self.generators = [generator for module in self.modules for generator in generators_of(module, step_path)]

    @property
    def flags(self) -> Flags:
        """The training mode of each module."""
        return tuple([m.training for m in self.modules])

    def holds(self, root: Any) -> bool:
        """True if the modules are the same, with slots of the same names."""
        # In this order: the tables belong to the modules that were found.
        found, expected = self._values(root), self._targeted
        if not (all(map(is_, found, expected)) or all(map(_is_still, expected, found))):
            return False
        children = self._children_now()
        return (
            len(children) == len(self._children)
            and all(map(is_, children, self._children))
            and list(map(tuple, self._tensor_tables)) == self._names
        )

    def slots(self, root: Any) -> list[TensorSlot]:
        """Return all slots, each once."""
        if not self._loose:
            return self._slots
        known = {(id(slot.table), slot.name) for slot in self._slots}
        loose = {(id(slot.table), slot.name): slot for slot in (_loose(root, path) for path in self._loose)}
        return [*self._slots, *(slot for key, slot in loose.items() if key not in known)]

    def tensors(self, slots: Sequence[TensorSlot]) -> list[Any]:
        """Return the present tensors of ``slots``, the slots of this layout, as long as it holds."""
        if self._loose:
            return [slot.table.get(slot.name) for slot in slots]
        return list(chain.from_iterable(map(_values_of, self._tensor_tables)))  # without one call per slot

    def _values(self, root: Any) -> Sequence[Any]:
        try:
            return self._get(root)
        except AttributeError as error:
            raise MfxError(f"step {self._step_path} reads what the model no longer has: {error}") from error

    def _children_now(self) -> list[Any]:
        return list(chain.from_iterable(map(_values_of, self._module_tables)))

    def _inside(self, module: nn.Module, path: str) -> Iterator[TensorSlot]:
        if any(module is m for m in self.modules):
            return
        self.modules.append(module)
        for table, is_parameter in zip(tensor_tables(module), (True, False), strict=True):
            yield from (TensorSlot(table, name, f"{path}.{name}", is_parameter) for name in table)
        for name, child in module._modules.items():
            if child is not None:
                yield from self._inside(child, f"{path}.{name}")


def layout_of(cache: dict[Any, Any], key: Any, root: Any, targets: Sequence[str], step_path: str) -> StateLayout:
    """Return the step's layout, from ``cache`` under ``key`` if that one still holds.

    Raises:
        MfxError: the model no longer has what the step reads.
    """
    layout: StateLayout | None = cache.get(key)
    if layout is None or not layout.holds(root):
        layout = cache[key] = StateLayout(root, targets, step_path)
    return layout


def _loose(root: Any, path: str) -> TensorSlot:
    """Return the slot of a tensor that is itself a target."""
    parent, _, name = path.rpartition(".")
    holder = resolve(root, parent)
    tables: list[Table] = [holder.__dict__]
    if isinstance(holder, nn.Module):
        tables = [*tensor_tables(holder), *tables]
    table = next((table for table in tables if name in table), tables[-1])
    return TensorSlot(table, name, path, len(tables) > 1 and table is tables[0])


def _getter(paths: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    """Return a function from a root to the values at all of the paths."""
    if not paths or not all(paths):
        return partial(_resolve_all, paths)
    get = attrgetter(*paths)  # as ``resolve``, in one call
    return get if len(paths) > 1 else partial(_get_one, get)


def _resolve_all(paths: Sequence[str], root: Any) -> Sequence[Any]:
    return [resolve(root, path) for path in paths]


def _get_one(get: Callable[[Any], Any], root: Any) -> Sequence[Any]:
    return (get(root),)


def _is_still(module: nn.Module | None, value: Any) -> bool:
    return value is module if module is not None else not isinstance(value, nn.Module)
