"""A second tree of modules over the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

M = TypeVar("M", bound=nn.Module)


class Overlay:
    """What stands in a module's ``__dict__`` as ``forward``, in front of its class's; a tree copy is made without it.

    Attributes:
        shown: names of the other attributes that came with it.
    """

    shown: tuple[str, ...] = ()


def tree_copy(model: M, tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> M:
    """A copy of a model in which every module is new, and every tensor the original's.

    So class, attributes, key order and hooks are the original's too, and ``train()``, a replaced submodule or a new hook
    on one of the two does not touch the other.

    Args:
        model: any module.
        tensor: what stands in the copy for each parameter, buffer and other tensor; itself by default.
    """
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers(), _attributes(model))}
    memo: dict[int, Any] = {key: tensor(t) for key, t in tensors.items()}
    memo.update((id(value), None) for module in model.modules() for value in _overlaid(module).values())
    copied = copy.deepcopy(model, memo)
    for module, copied_module in zip(model.modules(), copied.modules(), strict=True):
        for name in _overlaid(module):
            del copied_module.__dict__[name]
    return copied


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that are plain attributes of modules, or lie in plain containers there."""
    for module in model.modules():
        plain = {name: value for name, value in module.__dict__.items() if isinstance(value, Tensor | list | tuple | dict)}
        plain = {name: value for name, value in plain.items() if not name.startswith("_") or isinstance(value, Tensor)}
        yield from (leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor))


def _overlaid(module: nn.Module) -> dict[str, Any]:
    """The attributes that momentumize gave an instance."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, Overlay):
        return {}
    return {name: module.__dict__[name] for name in ("forward", *forward.shown) if name in module.__dict__}
