"""Joins: pieces of a value put together again, all of them and in order, which gives the value itself.

``cat`` of the pieces of a ``split``, ``chunk`` or ``tensor_split``, of slices or of ``narrow``; ``stack`` of what
``unbind`` gives; ``cat`` of one tensor. The pieces may be copies, or have been packed again. If more is behind the last
piece, the join is shorter than the value: a step from one to the other is refused once shapes are known.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from mfx_passes.ops import packing
from mfx_passes.ops.lengths import ZERO, Length, is_ordered, length, plus

_CATS = frozenset({torch.cat, torch.concat, torch.concatenate})
_STACKS = {torch.hstack: 1, torch.vstack: 0, torch.row_stack: 0, torch.dstack: 2}  # but for fewer dimensions
_COPIES = frozenset({"contiguous", "clone", torch.clone})

_SPLITS = frozenset({"split", "split_with_sizes", torch.split, torch.split_with_sizes})
_CHUNKS = frozenset({"chunk", "tensor_split", torch.chunk, torch.tensor_split})
_CHUNKS_ALONG = {
    "hsplit": 1, "vsplit": 0, "dsplit": 2, torch.hsplit: 1, torch.vsplit: 0, torch.dsplit: 2,
}  # fmt: skip
_UNBINDS = frozenset({"unbind", torch.unbind})
_NARROWS = frozenset({"narrow", torch.narrow})
_SELECTS = frozenset({"select", torch.select})


@dataclass(frozen=True)
class Piece:
    """A piece of a value along a dimension.

    Args:
        source: the value.
        dim: the dimension, negative if it is counted from the last one.
        start: the first index, or what splits the value, and the number of the piece.
        stop: the same for the index behind the last one; None at the value's end.
        is_slice: False if the piece does not have the dimension any more.
    """

    source: Node
    dim: int
    start: Length | tuple[Node, int]
    stop: Length | tuple[Node, int] | None
    is_slice: bool = True


def joined(node: Node) -> Node | None:
    """Return the value whose pieces a node puts together again, None if it does not."""
    if node.op != "call_function" or "out" in node.kwargs:
        return None
    target: Any = node.target
    if target not in _CATS and target not in _STACKS and target is not torch.stack:
        return None
    tensors = _argument(node, 0, "tensors")
    dim = _STACKS[target] if target in _STACKS else _argument(node, 1, "dim", "axis", default=0)
    is_slice = target is not torch.stack
    if isinstance(tensors, Node):
        split = _split(tensors)
        whole = split is not None and split.is_slice == is_slice and _is_same(dim, split.dim, split.source)
        return split.source if split and whole else None
    if not isinstance(tensors, list | tuple) or not tensors:
        return None
    if len(tensors) > 1:
        return _whole(tensors, dim, is_slice)
    return tensors[0] if target in _CATS and isinstance(tensors[0], Node) else None


def _flat(nodes: Sequence[Any], dim: Any) -> Iterator[Any]:
    """Yield nodes, and in the place of one that puts others together along a dimension, these."""
    for node in nodes:
        inner = _argument(node, 0, "tensors") if isinstance(node, Node) and node.target in _CATS else None
        if isinstance(inner, list | tuple) and _argument(node, 1, "dim", "axis", default=0) == dim:
            yield from _flat(inner, dim)
        else:
            yield node


def _whole(nodes: Sequence[Any], dim: Any, is_slice: bool) -> Node | None:
    """Return the value that nodes are the pieces of; pieces of a piece are put together first."""
    stack: list[Node] = []
    for node in _flat(nodes, dim) if is_slice else nodes:
        if not isinstance(node, Node):
            return None
        if stack and not _follows(stack[-1], node):
            _close(stack, dim, is_slice)
        stack.append(node)
    while _close(stack, dim, is_slice):
        is_slice = True
    return stack[0] if len(stack) == 1 else None


def _follows(before: Node, node: Node) -> bool:
    one, other = _piece(before), _piece(node)
    return one is not None and other is not None and (one.source, one.stop) == (other.source, other.start)


def _close(stack: list[Node], dim: Any, is_slice: bool) -> bool:
    """Put a value in the place of its pieces at the end of a list; False if there are none."""
    run: list[Piece] = []
    while len(run) < len(stack) and (piece := _piece(stack[-1 - len(run)])) is not None:
        if run and (piece.source, piece.stop) != (run[0].source, run[0].start):
            break
        run.insert(0, piece)
        if piece.start == ZERO:
            break
    if len(run) < 2 or run[0].start != ZERO or not _is_one(run, dim, is_slice):
        return False
    del stack[-len(run) :]
    stack.append(run[0].source)
    return True


def _is_one(run: Sequence[Piece], dim: Any, is_slice: bool) -> bool:
    """True if pieces that follow each other are all along a dimension, and none reaches back."""
    inner = [piece.start for piece in run[1:]]
    return all(piece.is_slice == is_slice and _is_same(dim, piece.dim, piece.source) for piece in run) and all(
        isinstance(one, tuple) or isinstance(other, tuple) or is_ordered(one, other) for one, other in pairwise(inner)
    )


def _is_same(dim: Any, other: int, source: Node) -> bool:
    """True if two numbers mean the same dimension of a value; one of them may count from the last one."""
    value = source.meta.get("val")
    rank = value.dim() if isinstance(value, torch.Tensor) else 0
    return type(dim) is int and (dim == other or (rank > 0 and (dim - other) % rank == 0))


def _piece(node: Node) -> Piece | None:
    while isinstance(same := node.args[0] if node.target in _COPIES else packing.whole(node), Node):
        node = same
    if not node.args or not isinstance(of := node.args[0], Node):
        return None
    if node.target is operator.getitem:
        if (split := _split(of)) is not None:
            return split.piece(node.args[1])
        return _indexed(of, node.args[1])
    if node.target in _NARROWS:
        dim, start, size = (_argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length")))
        first, count = length(start), length(size)
        if type(dim) is not int or first is None or count is None:
            return None
        stop = plus(first, count)
        from_end = type(start) is int and start < 0
        return Piece(of, dim, first, None if from_end and stop == ZERO else stop)
    if node.target in _SELECTS:
        return _selected(of, _argument(node, 1, "dim"), _argument(node, 2, "index"))
    return None


def _selected(source: Node, dim: Any, index: Any) -> Piece | None:
    first = length(index)
    if type(dim) is not int or type(index) is not int or index < 0 or first is None:
        return None
    return Piece(source, dim, first, length(index + 1), is_slice=False)


def _indexed(source: Node, index: Any) -> Piece | None:
    """Return the piece that an index with one slice, or one number, takes out of a value."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(entry is Ellipsis or isinstance(entry, slice) or type(entry) is int for entry in entries):
        return None
    cuts = [(i, entry) for i, entry in enumerate(entries) if entry not in (Ellipsis, slice(None))]
    if len(cuts) != 1:
        return None
    ((i, cut),) = cuts
    dim = i - len(entries) if Ellipsis in entries[:i] else i
    if not isinstance(cut, slice):
        return _selected(source, dim, cut)
    start, stop = length(cut.start or 0), length(cut.stop)
    if cut.step not in (None, 1) or start is None or (stop is None and cut.stop is not None):
        return None
    return Piece(source, dim, start, stop)


@dataclass(frozen=True)
class _Split:
    """A node that gives all pieces of a value; their number is None if it is not known."""

    node: Node
    source: Node
    dim: int
    count: int | None
    is_slice: bool = True

    def piece(self, i: Any) -> Piece | None:
        if type(i) is int and i < 0 and self.count is not None:
            i += self.count
        if type(i) is not int or i < 0:
            return None
        stop = None if i + 1 == self.count else (self.node, i + 1)
        return Piece(self.source, self.dim, (self.node, i) if i else ZERO, stop, self.is_slice)


def _split(node: Node) -> _Split | None:
    target: Any = node.target
    source = _argument(node, 0, "input", "tensor", "self")
    if not isinstance(source, Node):
        return None
    if target in _UNBINDS:
        dim = _argument(node, 1, "dim", default=0)
        return _Split(node, source, dim, None, is_slice=False) if type(dim) is int else None
    if target not in _SPLITS and target not in _CHUNKS and target not in _CHUNKS_ALONG:
        return None
    dim = _CHUNKS_ALONG[target] if target in _CHUNKS_ALONG else _argument(node, 2, "dim", default=0)
    names = (
        "split_size_or_sections",
        "split_size",
        "split_sizes",
        "chunks",
        "indices_or_sections",
        "sections",
        "indices",
    )
    sections = _argument(node, 1, *names)
    if type(dim) is not int or isinstance(sections, Node):
        return None if type(dim) is not int else _Split(node, source, dim, None) if target in _SPLITS else None
    if target in _SPLITS:
        return _Split(node, source, dim, len(sections) if isinstance(sections, list | tuple) else None)
    if type(sections) is int:
        return _Split(node, source, dim, sections)
    if not isinstance(sections, list | tuple) or not _are_ordered(sections):
        return None
    return _Split(node, source, dim, len(sections) + 1)


def _are_ordered(indices: Sequence[Any]) -> bool:
    lengths = [length(index) for index in indices]
    known = [value for value in lengths if value is not None]
    return len(known) == len(lengths) and all(is_ordered(one, other) for one, other in pairwise(known))


def _argument(node: Node, position: int, *names: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)
