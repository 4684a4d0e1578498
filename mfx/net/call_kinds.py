"""Kinds of calls: keys under which a net remembers that a call has no graph, or a graph without chains."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.binding import frozen

_SWITCHES = (bool, str, type(None))


def kind_of(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the training mode, the arguments by what may switch a path (types, flags, words), if weights are cached.

    Neither a number nor the length of a list: the next step of a search is a call of the same kind.
    """
    named = (f"{name}={_switch(value)}" for name, value in sorted(kwargs.items()))
    cached = ["cached"] * caches_weights(net)
    return str(net.training), *map(_switch, args), *named, *cached


def caches_weights(net: nn.Module) -> bool:
    """True inside of ``torch.nn.utils.parametrize.cached()``, if the net has parametrizations.

    A graph of TorchDynamo would compute a tensor each time that it is read.
    """
    return compat.are_weights_cached() and any(map(is_parametrized, net.modules()))


def _switch(value: Any) -> str:
    if isinstance(value, _SWITCHES):
        return repr(value)
    keys = sorted(map(str, value)) if isinstance(value, Mapping) else ""
    return f"{type(value).__module__}.{type(value).__qualname__}{keys}"


def exact_kind_of(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    """Return all of a call that a graph may depend on besides the net: everything but the values of tensors.

    None if an argument is neither a tensor nor plain, or a size is a symbol, as while the net is exported.
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    try:
        kind = net.training, torch.is_grad_enabled(), spec, tuple(map(_exact, leaves))
        hash(kind)
    except TypeError:
        return None
    return kind


def _exact(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return frozen(leaf)
