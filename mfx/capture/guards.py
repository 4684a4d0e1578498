"""Guards on modules and tensors: the conditions under which a symbolic trace that walked through them holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import methodcaller
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn

from mfx.capture.class_guards import ClassGuard
from mfx.capture.module_guards import INTERNAL, ModuleGuard
from mfx.modules.references import attributes_of
from mfx_passes import paths

_TABLES = ("_parameters", "_buffers")
_ABSENT = object()
_DEPTH, _ENTRIES = 3, 256  # of containers and objects in each other, and in each, where tensors are looked for

HOLDS = methodcaller("holds")
"""True if a guard holds: for ``map``, a Python call per guard fewer than a generator."""


@dataclass(frozen=True)
class Place:
    """A place where a net holds a tensor: a parameter, a buffer, or an attribute of a module, or in one.

    Args:
        net: the net.
        modules: the names of the submodules that lead to the module.
        entries: the name of the attribute, and for each container or object on the way to the tensor where to look in
            it, and how much it holds, None if that may change.
    """

    net: nn.Module
    modules: tuple[str, ...]
    entries: tuple[tuple[Any, int | None], ...]

    @property
    def has_target(self) -> bool:
        """True if a graph can read it by a path: a parameter, a buffer or an attribute, but not what one holds."""
        return len(self.entries) == 1 or self.entries[0][0] in _TABLES

    @property
    def target(self) -> str:
        """The path by which a graph reads it if it can."""
        return paths.join(*self.modules, self.entries[-1][0])

    def read(self) -> Any:
        """Return what it holds now; ``_ABSENT`` if there is no such place, or a container has grown or shrunk."""
        try:
            module: Any = self.net
            for name in self.modules:
                module = module._modules[name]
            (name, _), *inner = self.entries
            value = module.__dict__[name]
            for key, length in inner:
                entries = _entries(value)
                if entries is None or (length is not None and len(entries) != length):
                    return _ABSENT
                value = entries[key]
        except (LookupError, AttributeError):
            return _ABSENT
        return value


@dataclass(frozen=True)
class TensorGuard:
    """A tensor that is no parameter or buffer, as it was when a graph was made that has it, or what is computed of it.

    Args:
        tensor: the tensor.
        version: how often it had been changed in place; None if the graph reads it at every call.
        place: a place where the net holds it; None if there is none.
    """

    tensor: torch.Tensor
    version: int | None
    place: Place | None = None

    def in_place(self) -> bool:
        """True: what modules there are has not changed."""
        return True

    def holds(self) -> bool:
        """True if it has not been changed or replaced."""
        if self.version is not None and _version(self.tensor) != self.version:
            return False
        return self.place is None or self.place.read() is self.tensor


@dataclass(frozen=True)
class TieGuard:
    """Two places that hold one tensor, of which a graph reads the first, whichever the model does.

    Args:
        first: the place that the graph reads.
        other: the other.
    """

    first: Place
    other: Place

    def in_place(self) -> bool:
        """True: what modules there are has not changed."""
        return True

    def holds(self) -> bool:
        """True if both hold one tensor, the same as before or another."""
        value = self.other.read()
        return value is not _ABSENT and value is self.first.read()


Guard: TypeAlias = ModuleGuard | ClassGuard | TensorGuard | TieGuard


def guards_of_tensors(
    net: nn.Module,
    used: Collection[torch.Tensor],
    constants: Collection[Any] = (),
    assigned: Mapping[nn.Module, set[str]] = MappingProxyType({}),
) -> list[TensorGuard]:
    """Return guards for tensors that are constants of a graph, or that its constants were computed from.

    Args:
        net: the net.
        used: tensors that constants were computed from.
        constants: what a graph reads at every call, which may be held by a module.
        assigned: names of the attributes that may change, by module.
    """
    if not used and not constants:
        return []
    places = _places(net, assigned)
    seen = {id(tensor) for tensor in used}
    more = [value for value in constants if id(value) not in seen]
    return [
        *(TensorGuard(t, _version(t), place) for t in used for place in places.get(id(t), (None,))),
        *(TensorGuard(t, None, place) for t in more for place in places.get(id(t), ())),
    ]


def guards_of_ties(
    net: nn.Module, targets: Collection[str], assigned: Mapping[nn.Module, set[str]]
) -> dict[str, list[TieGuard]]:
    """Return guards for the tensors that a graph reads by their paths and a net holds in several places, by target.

    A module that a graph calls as a whole reads its own: such a target is not among these.

    Args:
        net: the net.
        targets: the paths of what the graph reads, by which it reads one of the places.
        assigned: names of the attributes that may change, by module.
    """
    guards: dict[str, list[TieGuard]] = {}
    for places in _places(net, assigned).values() if targets else ():
        first = next((place for place in places if place.has_target and place.target in targets), None)
        if first is not None and len(places) > 1:
            guards[first.target] = [TieGuard(first, place) for place in places if place is not first]
    return guards


def _places(net: nn.Module, assigned: Mapping[nn.Module, set[str]]) -> dict[int, list[Place]]:
    """Return all places of each tensor that a net holds, by its identity."""
    places: dict[int, list[Place]] = {}
    for path, module in net.named_modules():
        modules = tuple(path.split(".")) if path else ()
        found: list[tuple[Any, Any]] = [
            (tensor, ((table, None), (name, None)))
            for table in _TABLES
            for name, tensor in getattr(module, table).items()
        ]
        for name, value in module.__dict__.items():
            if name not in INTERNAL and name not in assigned.get(module, ()):
                found += _tensors_in(value, ((name, None),))
        for tensor, entries in found:
            if tensor is not None:
                places.setdefault(id(tensor), []).append(Place(net, modules, entries))
    return places


def _tensors_in(value: Any, path: tuple[tuple[Any, int | None], ...]) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield the tensors in a value, and in containers and objects in it, each with its path."""
    if isinstance(value, torch.Tensor):
        yield value, path
    elif len(path) <= _DEPTH and (entries := _entries(value)) is not None:
        keys = entries if isinstance(entries, Mapping) else range(len(entries))
        for key in list(keys)[:_ENTRIES]:
            yield from _tensors_in(entries[key], (*path, (key, len(entries))))


def _entries(value: Any) -> Any:
    """Return what a container or an object of the user's holds, by key, number or name; None for other values."""
    if isinstance(value, Mapping | list | tuple | deque):
        return value
    return None if isinstance(value, nn.Module | type) else attributes_of(value)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
