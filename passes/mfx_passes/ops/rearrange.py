"""Rearrangements by einops, as a function and as a layer: how they move elements, and what undoes them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

from torch import nn
from torch.fx import Node

Side: TypeAlias = tuple[tuple[str, ...], ...]
"""One side of a pattern: the axes that each dimension is made of; none for a dimension of length 1."""

_DIMENSION = re.compile(r"\([^()]*\)|\S+")


@dataclass(frozen=True)
class Pattern:
    """The pattern of a node that rearranges. Axes are named by their order on the left.

    Args:
        left: dimensions of the tensor that it takes.
        right: dimensions of the tensor that it gives.
        lengths: of axes, as far as they are given: numbers, or nodes.
    """

    left: Side
    right: Side
    lengths: Mapping[str, Any]

    @property
    def layout(self) -> tuple[Any, ...]:
        """The way elements move, as one operation of torch if it is one; see `vocabulary.layout`."""
        if self.left == self.right:
            return ("neutral",)
        if [*chain(*self.left)] == [*chain(*self.right)]:
            return ("reshape",)
        if all(len(axes) == 1 for axes in self.left + self.right) and ("...",) not in self.left:
            return ("permute", *map(self.left.index, self.right))
        return ("rearrange", self.left, self.right)

    def inverse(self) -> tuple[str, dict[str, Any], dict[str, int]]:
        """Return what undoes the pattern: its text, given lengths, and dimensions of the tensor as other lengths."""
        text = " -> ".join(" ".join(f"({' '.join(axes)})" for axes in side) for side in (self.right, self.left))
        split = {axis for axes in self.right if len(axes) > 1 for axis in axes} - {"..."}
        count, rest = len(self.left), self.left.index(("...",)) if ("...",) in self.left else len(self.left)
        dims = {axes[0]: i if i < rest else i - count for i, axes in enumerate(self.left) if len(axes) == 1}
        given = {axis: value for axis, value in self.lengths.items() if axis in split}
        return text.replace("(...)", "..."), given, {axis: dims[axis] for axis in sorted(split & dims.keys() - given)}


def pattern(node: Node, modules: Mapping[str, nn.Module]) -> Pattern | None:
    """Return the pattern of a node that rearranges one tensor, None for other nodes."""
    text: Any
    lengths: Mapping[str, Any]
    if not (node.args and isinstance(node.args[0], Node)):
        return None
    if node.op == "call_module":
        module: Any = modules.get(str(node.target))
        if not _is_einops(type(module), "Rearrange"):
            return None
        text, lengths = module.pattern, module.axes_lengths
    elif node.op == "call_function" and _is_einops(node.target, "rearrange"):
        lengths = node.kwargs
        text = node.args[1] if len(node.args) > 1 else lengths.get("pattern")
    else:
        return None
    if not (isinstance(text, str) and text.count("->") == 1):
        return None
    left, right = map(_side, text.split("->"))
    names = _names(left, right)
    given = {names[axis]: length for axis, length in lengths.items() if axis in names}
    return Pattern(_renamed(left, names), _renamed(right, names), given)


def _side(text: str) -> Side:
    return tuple(tuple(axes.strip("()").split()) for axes in _DIMENSION.findall(text))


def are_inverse(after: Sequence[Side], before: Sequence[Side]) -> bool:
    """True if one pair of sides may undo another one: it does if it splits dimensions into the same lengths."""
    names = _names(*reversed(before))
    return [*after] == [_renamed(side, names) for side in reversed(before)]


def function() -> Any:
    """Return ``einops.rearrange``, which is there if a node rearranges."""
    return sys.modules["einops"].rearrange


def _names(*sides: Side) -> dict[str, str]:
    axes = dict.fromkeys(axis for side in sides for dim in side for axis in dim if axis not in ("1", "..."))
    return {**{axis: f"a{i}" for i, axis in enumerate(axes)}, "...": "..."}


def _renamed(side: Side, names: Mapping[str, str]) -> Side:
    return tuple(tuple(names[axis] for axis in dim if axis != "1") for dim in side)


def _is_einops(value: Any, name: str) -> bool:
    home = getattr(value, "__module__", None)
    return isinstance(home, str) and home.startswith("einops.") and getattr(value, "__name__", "") == name
