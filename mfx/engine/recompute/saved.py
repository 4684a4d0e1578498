"""Keeping tensors between forward and backward, the way autograd keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from mfx_passes.errors import MfxError


class _Saver(torch.autograd.Function):
    """Does nothing but save: whatever saved-tensor hooks are active around it get to see the tensors."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on what this function returns")


class SavedTensors:
    """Tensors kept through autograd's own saved tensors.

    A chain inside another chain's branch, or inside ``torch.utils.checkpoint``, must not hold on to what the outer one
    means to forget. Saved tensors are subject to the outer one's hooks, which provide them again when asked.
    """

    def __init__(self, tensors: Iterable[Tensor], what: str) -> None:
        self._what = what
        with torch.enable_grad():
            anchor = torch.empty(0, requires_grad=True)
            self._node: Any = _Saver.apply(anchor, *(t.detach() for t in tensors)).grad_fn

    def get(self) -> tuple[Tensor, ...]:
        """The tensors, detached.

        Raises:
            MfxError: if one of them was modified in place since.
        """
        return tuple(t.detach() for t in saved_by(self._node, self._what))


def saved_by(node: Any, what: str) -> tuple[Tensor, ...]:
    """The tensors that an autograd node saved.

    Raises:
        MfxError: if one of them, which ``what`` names, was modified in place since.
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


class Captures:
    """The other values that a chain's branches read, kept for their second run; tensors inside containers too."""

    def __init__(self, values: Sequence[Any], what: str) -> None:
        leaves, self._spec = tree_flatten(tuple(values))
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in self._places]
        self._requires_grad = [t.requires_grad for t in tensors]
        self._kept = SavedTensors(tensors, what) if tensors else None
        self._is_empty = not values
        self._later: list[Any] = []

    def extend(self, values: Iterable[Any]) -> None:
        """More values, of which only those that are no tensors can be got: sizes that a branch handed on."""
        self._later.extend(None if isinstance(value, Tensor) else value for value in values)

    def get(self) -> tuple[Any, ...]:
        """The values, with tensors detached from the graph and the same ``requires_grad`` as in the forward pass."""
        if self._is_empty:  # as a rule
            return tuple(self._later)
        leaves = list(self._leaves)
        tensors = self._kept.get() if self._kept is not None else ()
        for place, tensor, requires_grad in zip(self._places, tensors, self._requires_grad, strict=True):
            leaves[place] = tensor.requires_grad_(requires_grad)
        values: tuple[Any, ...] = tree_unflatten(leaves, self._spec)
        return (*values, *self._later)


def tensors_in(values: object) -> Iterable[Tensor]:
    """The tensors in ``values``, in containers too."""
    return (leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor))
