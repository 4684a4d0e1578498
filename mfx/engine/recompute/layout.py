"""The modules, parameters and buffers that a step reads through its root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from mfx_passes.errors import MfxError
from mfx_passes.paths import resolve

Flags = tuple[bool, ...]
Table = dict[str, Any]  # one that modules keep tensors or modules in


@dataclass(frozen=True, eq=False)
class TensorSlot:
    """Where a tensor lies: under ``name`` in ``table``; ``label`` is its dotted path."""

    table: Table
    name: str
    label: str
    is_parameter: bool

    def get(self) -> Any:
        """What lies there now, past whatever ``__getattr__`` would do."""
        return self.table.get(self.name)

    def put(self, value: Any) -> None:
        """Have ``value`` lie there, past whatever ``__setattr__`` would do."""
        self.table[self.name] = value


class StateLayout:
    """Everything under a step's targets: which modules there are, and which places for tensors.

    It knows no tensors, so that it can be kept from call to call, as long as it ``holds``.

    Attributes:
        changing: labels of the places whose tensors the step changes, by the modules' training flags, once known.
        has_buffers: whether there is any place that is not a module's parameter.
    """

    def __init__(self, root: Any, targets: Sequence[str], step_path: str) -> None:
        self._step_path = step_path
        self._get = _getter(targets)
        self.modules: list[nn.Module] = []
        self.changing: dict[Flags, frozenset[str]] = {}
        self._places: list[TensorSlot] = []
        self._loose: list[str] = []
        self._targeted: list[nn.Module | None] = []
        for target, value in zip(targets, self._values(root), strict=True):
            self._targeted.append(value if isinstance(value, nn.Module) else None)
            if isinstance(value, nn.Module):
                self._places.extend(self._inside(value, target))
            elif isinstance(value, Tensor):
                self._loose.append(target)
        # In the order of the places: what the tables hold is what lies there.
        self._tensor_tables: list[Table] = [table for m in self.modules for table in (m._parameters, m._buffers)]
        self.has_buffers = bool(self._loose) or not all(place.is_parameter for place in self._places)
        self._names = list(map(tuple, self._tensor_tables))
        self._module_tables = [m._modules for m in self.modules]
        self._children = self._children_now()

    @property
    def flags(self) -> Flags:
        """Which modules are in training mode."""
        return tuple([m.training for m in self.modules])

    def holds(self, root: Any) -> bool:
        """Whether the same modules are there, with places of the same names."""
        # In this order: the tables are those of the modules that were found.
        found, expected = self._values(root), self._targeted
        if not (all(map(is_, found, expected)) or all(map(_is_still, expected, found))):
            return False
        children = self._children_now()
        return (
            len(children) == len(self._children)
            and all(map(is_, children, self._children))
            and list(map(tuple, self._tensor_tables)) == self._names
        )

    def places(self, root: Any) -> list[TensorSlot]:
        """All places, each once."""
        if not self._loose:
            return self._places
        known = {(id(place.table), place.name) for place in self._places}
        loose = {(id(place.table), place.name): place for place in (_loose(root, path) for path in self._loose)}
        return [*self._places, *(place for key, place in loose.items() if key not in known)]

    def tensors(self, places: Sequence[TensorSlot]) -> list[Any]:
        """What lies at ``places`` now, which are those of this layout, as long as it holds."""
        if self._loose:
            return [place.table.get(place.name) for place in places]
        return list(chain.from_iterable(map(dict.values, self._tensor_tables)))  # without a call for each

    def _values(self, root: Any) -> Sequence[Any]:
        try:
            return self._get(root)
        except AttributeError as error:
            raise MfxError(f"step {self._step_path} reads what the model no longer has: {error}") from error

    def _children_now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._module_tables)))

    def _inside(self, module: nn.Module, path: str) -> Iterator[TensorSlot]:
        if any(module is m for m in self.modules):
            return
        self.modules.append(module)
        yield from (TensorSlot(module._parameters, name, f"{path}.{name}", True) for name in module._parameters)
        yield from (TensorSlot(module._buffers, name, f"{path}.{name}", False) for name in module._buffers)
        for name, child in module._modules.items():
            if child is not None:
                yield from self._inside(child, f"{path}.{name}")


def layout_of(cache: dict[Any, Any], key: Any, root: Any, targets: Sequence[str], step_path: str) -> StateLayout:
    """The step's layout as remembered under ``key``, or made anew if it is another one by now.

    Raises:
        MfxError: if the model has lost what the step reads.
    """
    layout: StateLayout | None = cache.get(key)
    if layout is None or not layout.holds(root):
        layout = cache[key] = StateLayout(root, targets, step_path)
    return layout


def _loose(root: Any, path: str) -> TensorSlot:
    """The place of a tensor that is itself a target."""
    parent, _, name = path.rpartition(".")
    owner = resolve(root, parent)
    tables: list[Table] = [owner.__dict__]
    if isinstance(owner, nn.Module):
        tables = [owner._parameters, owner._buffers, *tables]
    table = next((table for table in tables if name in table), tables[-1])
    return TensorSlot(table, name, path, isinstance(owner, nn.Module) and table is owner._parameters)


def _getter(paths: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    """What gets, from a root, what lies at all of the paths."""
    if not paths or not all(paths):
        return partial(_resolve_all, paths)
    get = attrgetter(*paths)  # what ``resolve`` does, in one call
    return get if len(paths) > 1 else partial(_get_one, get)


def _resolve_all(paths: Sequence[str], root: Any) -> Sequence[Any]:
    return [resolve(root, path) for path in paths]


def _get_one(get: Callable[[Any], Any], root: Any) -> Sequence[Any]:
    return (get(root),)


def _is_still(module: nn.Module | None, value: Any) -> bool:
    return value is module if module is not None else not isinstance(value, nn.Module)
