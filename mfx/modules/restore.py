"""Undoes what a capture does to a model; what a model initializes at its first call stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from mfx.compat import Table, hook_tables, is_fake, tensor_tables, without_modes, written_arguments

_ABSENT = object()


@contextmanager
def attributes_restored(net: nn.Module) -> Iterator[dict[nn.Module, set[str]]]:
    """Undo, at the end of this context, what is done to attributes of modules, and remove hooks that are added.

    Both or neither: a model that notes in an attribute that its hooks are there would add them twice.

    Yields:
        Filled at the end: names of the attributes that were set, by module.
    """
    before = {module: dict(module.__dict__) for module in net.modules()}
    hooks = [(table, set(table)) for module in net.modules() for table in hook_tables(module)]
    assigned: dict[nn.Module, set[str]] = {}
    try:
        yield assigned
    finally:
        for table, keys in hooks:
            for key in set(table) - keys:
                del table[key]
        for module, old in before.items():
            now = module.__dict__
            changed = {name for name in {**old, **now} if now.get(name, _ABSENT) is not old.get(name, _ABSENT)}
            # the tracer's, for constants of the graph
            changed = {name for name in changed if not name.startswith("_tensor_constant")}
            for name in changed:
                now.pop(name, None)
            now.update({name: old[name] for name in changed & old.keys()})
            if changed:
                assigned[module] = changed


@contextmanager
def tensors_restored(net: nn.Module) -> Iterator[list[str]]:
    """Put back, at the end of this context, the buffers and parameters that are replaced in it.

    Yields:
        Filled at the end: their names.
    """
    tables = [(table, dict(table)) for m in net.modules() for table in tensor_tables(m)]
    names: list[str] = []
    try:
        yield names
    finally:
        for table, old in tables:
            changed = [name for name in {**old, **table} if table.get(name, _ABSENT) is not old.get(name, _ABSENT)]
            if changed:
                table.clear()
                table.update(old)
            names += changed


@contextmanager
def restored_if_fake(net: nn.Module) -> Iterator[None]:
    """Put back, at the end of this context, attributes that hold fake tensors, and counts of calls.

    Within this context the model may run on fake tensors. What it initializes besides stays.
    """
    tables = [table for module in net.modules() for table in _tables(module)]
    before = [(table, dict(table), {name: _copy(value) for name, value in table.items()}) for table in tables]
    try:
        yield
    finally:
        for table, values, copies in before:
            for name in [name for name in table if _is_made_up(table[name], values.get(name))]:
                if name not in values:
                    del table[name]
                    continue
                table[name] = _with_contents(values[name], copies[name])


@contextmanager
def restored_if_changed() -> Iterator[None]:
    """Put back, at the end of this context, the values of real tensors that are changed in place in it.

    In a fake mode, operations that read no fake tensor are computed: a BatchNorm counts its batches.
    """
    with _Changes() as changes:
        try:
            yield
        finally:
            changes.undo()


class _Changes(TorchDispatchMode):
    """A dispatch mode that copies real tensors before they are changed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in pytree.tree_leaves(written_arguments(func, args, kwargs or {})):
            self._keep(tensor)
        return func(*args, **(kwargs or {}))

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and not is_fake(tensor) and id(tensor) not in self._kept:
            with without_modes():
                self._kept[id(tensor)] = tensor, tensor.detach().clone()

    def undo(self) -> None:
        """Put their values back."""
        with without_modes(), torch.no_grad():
            for tensor, before in self._kept.values():
                tensor.copy_(before)


def _tables(module: nn.Module) -> list[Table]:
    return [module.__dict__, *tensor_tables(module)]


def _copy(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else value


def _with_contents(value: Any, contents: Any) -> Any:
    """Return the same container, with the contents that it had."""
    if type(value) in (dict, set):
        value.clear()
        value.update(contents)
    elif type(value) is list:
        value[:] = contents
    return value


def _is_made_up(value: Any, before: Any) -> bool:
    if type(value) in (int, float):
        return value is not before and value != before
    if isinstance(value, Tensor):
        return is_fake(value)
    return type(value) in (list, tuple, dict, set) and any(
        is_fake(leaf) for leaf in pytree.tree_leaves(list(value) if type(value) is set else value)
    )
