"""Undoes what a capture does to a model; what a model initializes at its first call stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from mfx.compat import Table, is_fake, memory_of, tensor_tables, without_modes, written_arguments

_ABSENT = object()


@contextmanager
def tensors_restored(net: nn.Module) -> Iterator[list[str]]:
    """Put back, at the end of this context, the buffers, parameters and submodules that are replaced in it, or made.

    Yields:
        Filled at the end: their names.
    """
    tables = [(table, dict(table)) for m in net.modules() for table in _tables(m)]
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
    """Put back, at the end of this context, attributes, gradients and data that are fake tensors, and counts of calls.

    Within this context the model may run on fake tensors. What it initializes besides stays.
    """
    gradients = [(parameter, parameter.grad) for parameter in net.parameters() if parameter.is_leaf]
    before = [
        [
            (table, dict(table), {name: _copy(value) for name, value in table.items()})
            for table in (module.__dict__, *_tables(module))
        ]
        for module in net.modules()
    ]
    tensors = [t for tables in before for _, values, _ in tables for t in values.values() if isinstance(t, Tensor)]
    data = [(tensor, tensor.data) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, held in data:
            if tensor.device != held.device:  # a forward that sets ``tensor.data`` has set it to what has none
                tensor.data = held
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for tables in before:
            _forget_made_up(tables)


def _forget_made_up(tables: Sequence[tuple[Table, dict[str, Any], dict[str, Any]]]) -> None:
    """Put back the attributes of a module that are made up: what is assigned may go from one table to another.

    Args:
        tables: each with the values that it had, and copies of these.
    """
    names = {name for table, values, _ in tables for name in table if _is_made_up(table[name], values.get(name))}
    for table, values, copies in tables if names else ():
        for name in names & (table.keys() | values.keys()):
            if name not in values:
                del table[name]
            else:
                table[name] = _with_contents(values[name], copies[name])


@contextmanager
def restored_if_changed() -> Iterator[list[Tensor]]:
    """Put back, at the end of this context, the values of real tensors that are changed in place in it.

    In a fake mode, operations that read no fake tensor are computed: a BatchNorm counts its batches.

    Yields:
        The tensors that have been changed so far, but for those that were made in this context.
    """
    with _Changes() as changes:
        try:
            yield changes.written
        finally:
            changes.undo()


class _Changes(TorchDispatchMode):
    """A dispatch mode that copies real tensors before they are changed, but for those that were made under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: list[Tensor] = []
        self._written: set[int] = set()
        self._before: list[Tensor] = []
        self._made: dict[int, torch.UntypedStorage] = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in pytree.tree_leaves(written_arguments(func, args, kwargs or {})):
            self._keep(tensor)
        known = {memory_of(leaf.untyped_storage()) for leaf in pytree.tree_leaves((args, kwargs)) if _has_data(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if _has_data(leaf) and memory_of(leaf.untyped_storage()) not in known:
                self._made[memory_of(leaf.untyped_storage())] = leaf.untyped_storage()
        return result

    def _keep(self, tensor: Any) -> None:
        if (
            _has_data(tensor)
            and memory_of(tensor.untyped_storage()) not in self._made
            and id(tensor) not in self._written
        ):
            with without_modes():
                self.written.append(tensor)
                self._written.add(id(tensor))
                self._before.append(tensor.detach().clone())

    def undo(self) -> None:
        """Put their values back, the last first: a tensor may be a view of another."""
        with without_modes(), torch.no_grad():
            for tensor, before in reversed(list(zip(self.written, self._before, strict=True))):
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(before)


def _has_data(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_fake(value) and value.layout is torch.strided


def _tables(module: nn.Module) -> list[Table]:
    modules: Any = module._modules  # those of a scripted module are no dictionary, and cannot be replaced
    return [*tensor_tables(module), *([modules] if isinstance(modules, dict) else [])]


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
    if isinstance(value, nn.Module):
        return value is not before and any(map(is_fake, chain(value.parameters(), value.buffers())))
    return type(value) in (list, tuple, dict, set) and any(
        _is_made_up(leaf, leaf) for leaf in pytree.tree_leaves(list(value) if type(value) is set else value)
    )
