"""Some dimensions of a tensor made one, and one made several, as ``einops.pack`` and ``unpack`` do: ``b * d``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node


def merged(x: Tensor, before: int, after: int) -> Tensor:
    """Return a tensor with one dimension in the place of all, or none, that are between the first and the last ones.

    Args:
        x: the tensor.
        before: how many first dimensions stay.
        after: how many last dimensions stay.
    """
    if x.dim() < before + after:
        raise RuntimeError(f"a tensor of shape {tuple(x.shape)} has fewer than {before + after} dimensions to keep")
    end = x.dim() - after
    return x.reshape((*x.shape[:before], math.prod(x.shape[before:end]), *x.shape[end:]))


def parted(x: Tensor, before: int, after: int, lengths: Sequence[int]) -> Tensor:
    """Return a tensor with dimensions of these lengths in the place of one: what undoes `merged`."""
    if x.dim() != before + 1 + after:
        raise RuntimeError(f"a tensor of shape {tuple(x.shape)} does not have {before + 1 + after} dimensions")
    return x.reshape((*x.shape[:before], *lengths, *x.shape[before + 1 :]))


def layout(node: Node) -> tuple[Any, ...] | None:
    """Return the way in which a node packs or unpacks a tensor, None for other nodes; see `vocabulary.layout`."""
    is_one = node.target in (merged, parted) and isinstance(node.args[0], Node)
    return (node.target.__name__, *node.args[1:3]) if is_one else None  # type: ignore[union-attr]


def are_inverse(after: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """True if one layout undoes the other: of `parted` always, of `merged` if the lengths are the same."""
    return after[0] != before[0] and after[1:] == before[1:]


def whole(node: Node) -> Node | None:
    """Return the value whose parted dimension a node merges again, None if it does not: they are equal."""
    source = node.args[0] if node.target is merged else None
    is_undone = isinstance(source, Node) and source.target is parted and source.args[1:3] == node.args[1:3]
    return source.args[0] if is_undone else None  # type: ignore[union-attr, return-value]
