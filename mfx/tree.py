"""A second tree of modules over the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx import compat, sharding
from mfx_passes import MfxError

M = TypeVar("M", bound=nn.Module)


class Overlay:
    """What stands in a module's ``__dict__`` as ``forward``, in front of its class's; a tree copy is made without it.

    Attributes:
        shown: names of the other attributes that came with it.
        is_part: whether the module is a part of a net, and a capture of the net goes past its overlay.
    """

    shown: tuple[str, ...] = ()
    is_part = False


class Extra(nn.Module):
    """Holds the modules that mfx added to a net; a tree copy is made without it.

    Attributes:
        names: what each chain's module is called here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}


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
        with sharding.copying(model):
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
        sharding.share(model, memo)
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


@contextmanager
def without_parts(net: nn.Module) -> Iterator[None]:
    """Within this context, the parts of a net have the forward of their class, for a capture to go through."""
    parts = {
        module: forward
        for module in net.modules()
        if module is not net and isinstance(forward := module.__dict__.get("forward"), Overlay) and forward.is_part
    }
    for module in parts:
        del module.__dict__["forward"]
    try:
        yield
    finally:
        for module, forward in parts.items():
            module.__dict__["forward"] = forward


def drop_parts(net: nn.Module, called: set[str]) -> None:
    """Give the modules at these paths, and those inside of them, the forward of their class for good."""
    for path, module in net.named_modules():
        forward = module.__dict__.get("forward")
        if path and isinstance(forward, Overlay) and forward.is_part and not called.isdisjoint(_outer(path)):
            del module.__dict__["forward"]


def _outer(path: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    return list(accumulate(path.split("."), "{}.{}".format))


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """A module's own hooks, of all kinds that surround a call of it."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


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
        for table in hook_tables(module):
            for hook in table.values():
                if not isinstance(hook, partial) and id(getattr(hook, "__self__", None)) not in inside:
                    yield hook


def _overlaid(module: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that momentumize gave an instance."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, Overlay):
        return ()
    return tuple(name for name in ("forward", *forward.shown) if name in module.__dict__)


def _extras(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if isinstance(child, Extra)]
