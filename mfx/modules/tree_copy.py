"""A second tree of modules over the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.modules.overlay import Overlay, _extras, _overlaid
from mfx_passes import MfxError


@contextmanager
def copying(model: nn.Module) -> Iterator[None]:
    """Within this context the sharded modules of ``model`` can be deep-copied, as modules that are not sharded."""
    sharded = {module: type(module) for module in model.modules() if compat.shards_of(module) is not None}
    try:
        for module in sharded:
            module.__class__ = compat.class_before_sharding(module)
        yield
    finally:
        for module, kind in sharded.items():
            module.__class__ = kind


def share(model: nn.Module, copies: Mapping[int, Any]) -> None:
    """Have the copies of sharded modules be sharded with them: whatever is gathered for one is there for both.

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


M = TypeVar("M", bound=nn.Module)


def tree_copy(model: M, tensor: Callable[[Tensor], Tensor] | None = None) -> M:
    """A copy of a model in which every module is new, and every tensor the original's.

    So class, attributes, key order and hooks are the original's too, and ``train()``, a replaced submodule or a new
    hook on one of the two does not touch the other.

    Args:
        model: any module.
        tensor: what stands in the copy for each parameter, buffer and other tensor; itself by default,
            and then modules that are sharded over processes stay so.

    Raises:
        MfxError: the model holds something that cannot be copied.
    """
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers(), _attributes(model))}
    memo: dict[int, Any] = {key: t if tensor is None else tensor(t) for key, t in tensors.items()}
    memo.update((id(hook), hook) for hook in _outside_hooks(model))
    memo.update((id(shards), shards) for shards in map(compat.shards_of, model.modules()) if shards is not None)
    for module in model.modules():
        memo.update((id(module.__dict__[name]), None) for name in _overlaid(module))
        memo.update((id(child), None) for _, child in _extras(module))
    try:
        with copying(model):
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise MfxError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. mfx works on "
            "copy.deepcopy(model) with the same tensors; take out of the model what has no copy, or give its class a "
            "__deepcopy__."
        ) from error
    for module in model.modules():
        for name in _overlaid(module):
            del memo[id(module)].__dict__[name]
        for name, _ in _extras(module):
            del memo[id(module)]._modules[name]
    if tensor is None:
        share(model, memo)
    return copied


def net_of(model: M) -> M:
    """A tree copy of a model that is called the way its class says.

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
    """Tensors that are plain attributes of modules, or lie in plain containers there, or in modules there."""
    for module in model.modules():
        plain = {
            name: value for name, value in module.__dict__.items() if isinstance(value, Tensor | list | tuple | dict)
        }
        plain = {name: value for name, value in plain.items() if not name.startswith("_") or isinstance(value, Tensor)}
        for leaf in pytree.tree_leaves(plain):
            if isinstance(leaf, nn.Module):  # kept from being registered, in a list for example
                yield from chain(leaf.parameters(), leaf.buffers())
            elif isinstance(leaf, Tensor):
                yield leaf


def _outside_hooks(model: nn.Module) -> Iterator[Any]:
    """Hooks that are somebody else's (a recorder's, a trainer's), who means to hear from the copy too."""
    inside = set(map(id, model.modules()))
    for module in model.modules():
        for table in compat.hook_tables(module):
            for hook in table.values():
                if not isinstance(hook, partial) and id(getattr(hook, "__self__", None)) not in inside:
                    yield hook
