"""Guards on modules: the conditions on their attributes under which a symbolic trace that walked through them holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mfx.capture.snapshots import ABSENT, Noted, is_as, is_plain, noted
from mfx.modules.overlay import MARK, Extra, Overlay
from mfx_passes import paths

_OURS = frozenset({"forward", MARK, "graph", "code", "print_readable", "extra_repr"})  # lie there, and at times do not
INTERNAL = _OURS.union(nn.Module().__dict__)


@dataclass(frozen=True, slots=True)
class ModuleGuard:
    """One module as it was when it was walked through.

    Args:
        module: the module.
        kind: its class, which a parametrization changes.
        children: the names of its submodules, in order, and these.
        training: its training flag.
        values: its attributes that are numbers, strings and the like, and those that code mentions.
        missing: names of its parameters and buffers that are None.
        names: those that code mentions.
        known: names that it has, or may get.
        size: how many attributes, parameters and buffers it has, without those of an overlay.
        forward: the forward that the instance has in front of its class's; not guarded for the net itself.
    """

    module: nn.Module
    kind: type
    children: tuple[list[str], list[nn.Module | None]]
    training: bool
    values: tuple[Noted, ...]
    missing: list[str]
    names: frozenset[str]
    known: frozenset[str]
    size: int
    forward: Any

    @classmethod
    def of(
        cls, module: nn.Module, assigned: Collection[str], names: frozenset[str] = frozenset(), *, is_net: bool
    ) -> ModuleGuard:
        """Return a guard on the module as it is now; the attributes in ``assigned`` may change."""
        attributes = _names_of(module)
        return cls(
            module,
            type(module),
            _children(module),
            module.training,
            tuple(_own(module, assigned, names)),
            _missing(module),
            names,
            frozenset({*attributes, *assigned, *INTERNAL}),
            len(attributes - _OURS),
            ABSENT if is_net else _forward(module),
        )

    def in_place(self) -> bool:
        """True if it has the class and the submodules it had."""
        return type(self.module) is self.kind and _children(self.module) == self.children

    def holds(self) -> bool:
        """True if all of it is as it was."""
        module = self.module
        own = module.__dict__  # with few Python calls: there are guards by the hundred
        (names, modules), children = self.children, own["_modules"]
        is_as_it_was = [*children.values()] == modules and [*children] == names and type(module) is self.kind
        if own["training"] != self.training or not (is_as_it_was or self.in_place()):
            return False
        for name, fixed, before_and_look in self.values:
            value = own.get(name, ABSENT)
            if value is not fixed and not is_as(value, *before_and_look):
                return False
        size = len(own)
        if (parameters := own["_parameters"]) or own["_buffers"]:
            size += len(parameters) + len(own["_buffers"])
            if _missing(module) != self.missing:
                return False
        if size != self.size:
            for held in (own, parameters, own["_buffers"]):
                if not held.keys() <= self.known and not self.names.isdisjoint(held.keys() - self.known):
                    return False
        return (
            self.forward is ABSENT
            or ("forward" not in own and self.forward is None)
            or _forward(module) is self.forward
        )


def guards_of(
    net: nn.Module, leaves: Collection[str], assigned: Mapping[nn.Module, set[str]], names: frozenset[str] = frozenset()
) -> list[ModuleGuard]:
    """Return guards for every module of a net but ``leaves`` and those inside them, which a graph calls as a whole."""
    return [
        ModuleGuard.of(module, assigned.get(module, ()), names, is_net=module is net)
        for module in _walked(net, "", frozenset(leaves), set())
    ]


def _walked(module: nn.Module, path: str, leaves: frozenset[str], seen: set[int]) -> Iterator[nn.Module]:
    if path in leaves or id(module) in seen or isinstance(module, Extra):
        return
    seen.add(id(module))
    yield module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walked(child, paths.join(path, name), leaves, seen)


def _children(module: nn.Module) -> tuple[list[str], list[nn.Module | None]]:
    children = {name: child for name, child in module._modules.items() if not isinstance(child, Extra)}
    return [*children], [*children.values()]


def _missing(module: nn.Module) -> list[str]:
    return [name for table in (module._parameters, module._buffers) for name, t in table.items() if t is None]


def _forward(module: nn.Module) -> Any:
    forward = module.__dict__.get("forward")
    return None if isinstance(forward, Overlay) and forward.is_submodule else forward


def _names_of(module: nn.Module) -> set[str]:
    return {*module.__dict__, *module._parameters, *module._buffers}


def _own(module: nn.Module, assigned: Collection[str], names: frozenset[str]) -> Iterator[Noted]:
    """Yield the attributes of a module that a graph may depend on; a tensor is one that it reads, or has a guard.

    Of what is not plain, these are only those that code mentions: others may be somebody's, and change at every call.
    """
    for name, value in module.__dict__.items():
        if name in INTERNAL or name in assigned or isinstance(value, torch.Tensor):
            continue
        if name in names or is_plain(value):
            yield noted(name, value, names if name in names else frozenset())
