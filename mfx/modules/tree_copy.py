"""Copies a tree of modules over the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mfx import compat
from mfx.modules.overlay import Overlay, added_to
from mfx_passes import MfxError

M = TypeVar("M", bound=nn.Module)


def tree_copy(model: M, tensor: Callable[[Tensor], Tensor] | None = None) -> M:
    """Copy a model such that every module is new, and every tensor the original's.

    Class, attributes, key order and hooks are the original's too; ``train()``, a replaced submodule or a new hook on
    one of the two does not touch the other.

    Args:
        model: any module.
        tensor: returns what the copy has in the place of a parameter, buffer or other tensor. By default that is the
            tensor itself, and modules that are sharded over processes stay so.

    Raises:
        MfxError: the model holds something that cannot be copied.
    """
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers(), _attributes(model))}
    memo: dict[int, Any] = {key: t if tensor is None else tensor(t) for key, t in tensors.items()}
    memo.update(
        (id(m), compat.scripted_copy(m, None if tensor is None else lambda t: memo[id(t)]))
        for m in _outermost_scripted(model)
    )
    memo.update((id(hook), hook) for hook in _outside_hooks(model))
    memo.update((id(shards), shards) for shards in map(compat.shards_of, model.modules()) if shards is not None)
    added = [(module, table, name) for module in model.modules() for table, name in added_to(module)]
    memo.update((id(getattr(module, table)[name]), None) for module, table, name in added)
    try:
        with _unsharded(model):
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise MfxError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. mfx works on "
            "copy.deepcopy(model) with the same tensors; take out of the model what has no copy, or give its class a "
            "__deepcopy__."
        ) from error
    for module, table, name in added:
        getattr(memo[id(module)], table).pop(name, None)  # the copy of a GraphModule leaves it out by itself
    if tensor is None:
        _share_shards(model, memo)
    return copied


def net_of(model: M) -> M:
    """Return a tree copy of a model that is called by the forward of its class.

    Raises:
        MfxError: it is a wrapper, or its forward was compiled or replaced, or it cannot be copied.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise MfxError("a ScriptModule has no Python code to trace. Momentumize the model before it is scripted.")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise MfxError(
            f"{type(model).__name__} wraps a model; momentumize the model inside it. DistributedDataParallel can wrap "
            "what that returns; DataParallel's replicas cannot run it."
        )
    if "forward" in model.__dict__ and not isinstance(model.__dict__["forward"], Overlay):
        raise MfxError(
            f"the forward of this {type(model).__name__} has been replaced on the instance (torch.compile, accelerate "
            "and others do so). Momentumize the model first, and wrap what that returns."
        )
    return tree_copy(model)


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """Yield tensors that are plain attributes of modules, or lie in plain containers there, or in modules there."""
    for module in model.modules():
        plain = {
            name: value for name, value in module.__dict__.items() if isinstance(value, Tensor | list | tuple | dict)
        }
        plain = {name: value for name, value in plain.items() if not name.startswith("_") or isinstance(value, Tensor)}
        for leaf in _leaves(plain, set()):
            if isinstance(leaf, nn.Module):  # not registered: in a list, for example
                yield from chain(leaf.parameters(), leaf.buffers())
            elif isinstance(leaf, Tensor):
                yield leaf


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield what containers hold, which may be in themselves."""
    if not isinstance(value, list | tuple | dict):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item, seen)


def _outermost_scripted(module: nn.Module) -> Iterator[torch.jit.ScriptModule]:
    if isinstance(module, torch.jit.ScriptModule):
        yield module
    else:
        for child in module.children():
            yield from _outermost_scripted(child)


def _outside_hooks(model: nn.Module) -> Iterator[Any]:
    """Yield hooks that belong to objects outside the model (a recorder, a trainer), which are to see the copy too."""
    inside = set(map(id, model.modules()))
    for module in model.modules():
        for table in compat.hook_tables(module):
            for hook in table.values():
                if not isinstance(hook, partial) and id(getattr(hook, "__self__", None)) not in inside:
                    yield hook


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Within this context, sharded modules have the class from before, and deepcopy makes modules of that one."""
    sharded = {module: type(module) for module in model.modules() if compat.shards_of(module) is not None}
    try:
        for module in sharded:
            module.__class__ = compat.class_before_sharding(module)
        yield
    finally:
        for module, cls in sharded.items():
            module.__class__ = cls


def _share_shards(model: nn.Module, copies: Mapping[int, Any]) -> None:
    """Shard the copies of sharded modules with them: parameters are gathered once for both.

    Args:
        model: the model that was copied.
        copies: the copies of its modules, by identity of the module.

    Raises:
        MfxError: ``fully_shard`` was given several modules at once.
    """
    for path, module in model.named_modules():
        shards = compat.shards_of(module)
        if shards is None:
            continue
        if compat.is_group(shards):
            raise MfxError(
                f"fully_shard was given several modules at once, {path} among them, and which of them have run is "
                "known to it by the module. Apply it to one module at a time, or to the momentumized net."
            )
        compat.share_shards(module, copies[id(module)], copies)
