"""Tensors kept between forward and backward as autograd keeps them: as saved tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from mfx.engine.offload import Offload
from mfx_passes.errors import MfxError


class _Saver(torch.autograd.Function):
    """Does nothing but save tensors, so that the active saved-tensor hooks apply to them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on what this function returns")


class SavedTensors:
    """Tensors kept as saved tensors of an autograd node.

    A chain inside another chain's branch, or inside ``torch.utils.checkpoint``, must not keep alive what the outer one
    frees. Saved tensors are subject to the hooks of the outer one, which recompute them when they are needed.

    Args:
        tensors: the tensors.
        what: says what they are, for messages.
        offload: moves them to host memory, if there is nobody around who keeps or recomputes them.
    """

    def __init__(self, tensors: Iterable[Tensor], what: str, offload: Offload | None = None) -> None:
        self._what = what
        with torch.enable_grad(), nullcontext() if offload is None else offload.group():
            anchor = torch.empty(0, requires_grad=True)
            # What was made in inference mode cannot be saved, a copy can.
            detached = ((t.clone() if t.is_inference() else t).detach() for t in tensors)
            # Kept, for up to torch 2.12 a node frees what it saved when its outputs are gone.
            self._output: Tensor = _Saver.apply(anchor, *detached)

    def get(self) -> tuple[Tensor, ...]:
        """Return the tensors, detached.

        Raises:
            MfxError: a tensor was modified in place since.
        """
        return tuple(t.detach() for t in saved_by(self._output.grad_fn, self._what))


def saved_by(node: Any, what: str) -> tuple[Tensor, ...]:
    """Return the tensors that an autograd node saved.

    Raises:
        MfxError: a tensor was modified in place since; ``what`` names them.
    """
    try:
        return tuple(node.saved_tensors)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise MfxError(
            f"{what} was modified in place between the forward and the backward pass, which still needs it; use the "
            "out-of-place operation or modify a clone"
        ) from error


def freed(what: str) -> MfxError:
    """Return the error for what a backward pass needs after an earlier one has freed it with the graph."""
    return MfxError(f"{what} was freed with the graph by an earlier backward pass; give that one retain_graph=True")


class Captures:
    """The other values that a chain's branches read, kept for recomputation; tensors inside containers too."""

    def __init__(self, values: Sequence[Any], what: str) -> None:
        leaves, self._spec = tree_flatten(tuple(values))
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in self._positions]
        self._requires_grad = [t.requires_grad for t in tensors]
        self._kept = SavedTensors(tensors, what) if tensors else None
        self._is_empty = not values
        self._later: list[Any] = []

    def extend(self, values: Iterable[Any]) -> None:
        """Add side outputs of a branch. Only those that are not tensors can be read later, such as sizes."""
        self._later.extend(None if isinstance(value, Tensor) else value for value in values)

    def get(self) -> tuple[Any, ...]:
        """Return the values, tensors detached and with the ``requires_grad`` of the forward pass."""
        if self._is_empty:  # the usual case
            return tuple(self._later)
        leaves = list(self._leaves)
        tensors = self._kept.get() if self._kept is not None else ()
        for position, tensor, requires_grad in zip(self._positions, tensors, self._requires_grad, strict=True):
            leaves[position] = tensor.requires_grad_(requires_grad)
        values: tuple[Any, ...] = tree_unflatten(leaves, self._spec)
        return (*values, *self._later)


def tensors_in(values: object) -> Iterable[Tensor]:
    """Return the tensors in ``values``, in containers too."""
    return (leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor))
