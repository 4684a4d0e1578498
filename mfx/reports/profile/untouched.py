"""Training steps that leave no trace in the user's model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from mfx.modules.tree_copy import M, net_of, tree_copy
from mfx.net.forward import forward_of
from mfx_passes import MfxError


def check_values(model: nn.Module) -> None:
    """Check that a model has values to compute with.

    Raises:
        MfxError: it has not.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise MfxError(f"{name} has no shape yet. Call the {type(model).__name__} once before it is profiled.")
        if tensor.device.type == "meta":
            raise MfxError(f"{name} is on the meta device: a profile computes with values. mfx.explain does without.")


def apart(model: M) -> M:
    """A copy of a model in training mode over the same parameter values, with buffers and gradients of its own.

    Of a momentumized net, it is a copy of the net before it was.

    Raises:
        MfxError: the model cannot be copied.
    """
    return _in_training(tree_copy(net_of(model), _stand_in))


def as_momentumized(model: M) -> M | None:
    """The same of a momentumized net as it is; None for any other model."""
    if forward_of(model) is None:
        return None
    return _in_training(copy.deepcopy(model, {id(t): _stand_in(t) for t in chain(model.parameters(), model.buffers())}))


def _in_training(net: M) -> M:
    return net if net.training else net.train()


def copies(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The same arguments, with tensors that may be changed in place, and have a ``.grad`` of their own."""
    return pytree.tree_map_only(Tensor, _copy, (args, kwargs))  # type: ignore[no-any-return]


def _stand_in(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)  # the same memory
    return _copy(tensor)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the gradients and buffers of modules back at the end; within, their gradients are freed as they come."""
    modules = list(modules)
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    tables = {id(m): m._buffers for module in modules for m in module.modules()}.values()
    buffers = [(table, name, b, b.clone()) for table in tables for name, b in table.items() if b is not None]
    hooks = [p.register_post_accumulate_grad_hook(_free) for p in parameters if p.requires_grad and p.is_leaf]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for table, name, buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                table[name] = buffer


def _free(parameter: Tensor) -> None:
    parameter.grad = None
