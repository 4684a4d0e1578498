"""The modules, parameters and buffers that a step reads through its root."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mfx_passes.errors import MfxError

__all__ = ["Reads", "Slot"]


@dataclass(frozen=True)
class Slot:
    """A place that holds a tensor: attribute ``name`` of ``owner``, found under the dotted path ``label``."""

    owner: Any
    name: str
    label: str
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        """Whether a branch may be expected to leave it alone."""
        return isinstance(self.owner, nn.Module) and self.name in self.owner._parameters

    @property
    def is_replaced(self) -> bool:
        """Whether it holds another tensor by now."""
        return self._table().get(self.name) is not self.tensor

    def put(self, tensor: Tensor) -> None:
        """Have it hold ``tensor``, past whatever ``__setattr__`` would do."""
        self._table()[self.name] = tensor

    def _table(self) -> dict[str, Any]:
        tables: list[dict[str, Any]] = [self.owner.__dict__]
        if isinstance(self.owner, nn.Module):
            tables = [self.owner._parameters, self.owner._buffers, *tables]
        return next((table for table in tables if self.name in table), tables[-1])


class Reads:
    """Everything under ``targets``, as it is now: ``modules`` by identity, once each, and the ``slots`` in them."""

    def __init__(self, root: Any, targets: Sequence[str], step_path: str) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.slots: list[Slot] = []
        seen: set[tuple[int, str]] = set()
        for target in targets:
            for slot in self._find(root, target, step_path):
                key = id(slot.owner), slot.name
                if key not in seen:
                    seen.add(key)
                    self.slots.append(slot)

    @property
    def flags(self) -> tuple[bool, ...]:
        """Which modules are in training mode."""
        return tuple(m.training for m in self.modules.values())

    def _find(self, root: Any, target: str, step_path: str) -> Iterator[Slot]:
        parent, _, name = target.rpartition(".")
        try:
            owner = resolve(root, parent)
            value = getattr(owner, name)
        except AttributeError as error:
            raise MfxError(f"step {step_path} reads {target}, which the model no longer has: {error}") from error
        if isinstance(value, Tensor):
            yield Slot(owner, name, target, value)
        elif isinstance(value, nn.Module):
            yield from self._inside(value, target)

    def _inside(self, module: nn.Module, path: str) -> Iterator[Slot]:
        if id(module) in self.modules:
            return
        self.modules[id(module)] = module
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield Slot(module, name, f"{path}.{name}", tensor)
        for name, child in module._modules.items():
            if child is not None:
                yield from self._inside(child, f"{path}.{name}")


def resolve(root: Any, path: str) -> Any:
    """``root.a.b`` for "a.b"; ``root`` for ""."""
    for name in filter(None, path.split(".")):
        root = getattr(root, name)
    return root
