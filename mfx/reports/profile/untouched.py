"""Copies of the model and restored state, so that training steps leave the user's model unchanged."""

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
        MfxError: a parameter or buffer has no values.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise MfxError(f"{name} has no shape yet. Call the {type(model).__name__} once before it is profiled.")
        if tensor.device.type == "meta":
            raise MfxError(f"{name} is on the meta device: a profile computes with values. mfx.explain does without.")


def copy_original(model: M) -> M:
    """Copy a model over the same parameter values, in training mode, with buffers and gradients of its own.

    A momentumized net is copied as it was before.

    Raises:
        MfxError: the model cannot be copied.
    """
    return _in_training(tree_copy(net_of(model), _stand_in))


def copy_momentumized(model: M) -> M | None:
    """Copy a momentumized net in the same way, as it is; return None for any other model."""
    if forward_of(model) is None:
        return None
    return _in_training(copy.deepcopy(model, {id(t): _stand_in(t) for t in chain(model.parameters(), model.buffers())}))


def _in_training(net: M) -> M:
    return net if net.training else net.train()


def copy_inputs(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the same arguments with copies of tensors, to be changed in place and to have a ``.grad`` of their own."""
    return pytree.tree_map_only(Tensor, _copy, (args, kwargs))  # type: ignore[no-any-return]


def _stand_in(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)  # the same memory
    return _copy(tensor)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the gradients and buffers of modules at the end; inside, there are no gradients at first."""
    modules = list(modules)
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    tables = {id(m): m._buffers for module in modules for m in module.modules()}.values()
    buffers = [(table, name, b, b.clone()) for table in tables for name, b in table.items() if b is not None]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for table, name, buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                table[name] = buffer


def free_gradients(modules: Iterable[nn.Module]) -> None:
    """Free the gradients of modules' parameters."""
    for parameter in chain.from_iterable(module.parameters() for module in modules):
        parameter.grad = None
