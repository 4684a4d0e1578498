"""Packing, which TorchDynamo writes with the numbers of one call, told by what it does to dimensions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mfx_passes.ops.packing import merged, parted

Shape = tuple[int | torch.SymInt, ...]
"""Sizes of a tensor: numbers, and expressions of the sizes that differ between calls."""


def name_packing(graph: Graph) -> None:
    """Write reshapes that make one dimension of several, or several of one, as `merged` and `parted`.

    Slices that take all of a value, and reshapes that keep its shape, are taken out.

    Before::

        packed = x.reshape((2, -1, 8)); y = f(packed); piece = y[:, 0:12]; out = piece.reshape((2, 3, 4, 8))

    After::

        packed = merged(x, 1, 1); y = f(packed); out = parted(y, 1, 1, (3, 4))
    """
    for node in list(graph.nodes):
        is_slice, is_reshape = node.target is operator.getitem, node.op == "call_method" and node.target == "reshape"
        after = _shape(node) if is_slice or is_reshape else None
        before = _shape(source := node.args[0]) if after is not None else None
        if before is None or after is None:
            continue
        if _are_same(before, after) and (is_reshape or _are_slices(node.args[1])):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif is_reshape and (found := _ends(before, after)) is not None:
            node.op, (first, last) = "call_function", found
            node.target = merged if len(before) > len(after) else parted
            lengths = (_written(node, after)[first : len(after) - last],) if node.target is parted else ()
            node.args, node.kwargs = (source, first, last, *lengths), {}


def _are_slices(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry is Ellipsis or (isinstance(entry, slice) and entry.step in (None, 1)) for entry in entries)


def _ends(before: Shape, after: Shape) -> tuple[int, int] | None:
    """Return how many first and last dimensions stay where one becomes several or the other way, else None."""
    least = min(len(before), len(after)) - 1
    first = next((i for i in range(least) if not _are_equal(before[i], after[i])), least)
    last = next((i for i in range(least - first) if not _are_equal(before[-1 - i], after[-1 - i])), least - first)
    return (first, last) if first + last == least and len(before) != len(after) else None


def _are_equal(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """True if two sizes are the same in all calls that the graph serves."""
    return statically_known_true(one == other)


def _are_same(before: Shape, after: Shape) -> bool:
    return len(before) == len(after) and all(map(_are_equal, before, after))


def _written(node: Node, shape: Shape) -> tuple[Any, ...]:
    """Return a shape as numbers, and what a reshape is given where sizes are not: nodes, or -1 for one of them."""
    given: Any = (*node.args[1:], *node.kwargs.values())
    if len(given) == 1 and isinstance(given[0], list | tuple):
        (given,) = given
    return tuple(size if type(size) is int else arg for size, arg in zip(shape, given, strict=True))


def _shape(value: Any) -> Shape | None:
    example = value.meta.get("example_value") if isinstance(value, Node) else None
    return tuple(example.shape) or None if isinstance(example, torch.Tensor) and not example.is_nested else None
