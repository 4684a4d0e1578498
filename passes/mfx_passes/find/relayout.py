"""Put back every state of a layout that is kept over several sums, so that the chain can go on before and after.

A window attention cuts the stream into windows once, for two sums. With P for the cutting and Q for what undoes it:

Before::

    windows = P(x)
    add = windows + attn(windows)
    add_1 = add + mlp(add)
    out = Q(add_1)

After::

    windows = P(x)
    add = windows + attn(windows)
    state = P⁻¹(add)                 # laid out as x and out are
    again = P(state)                 # add once more
    add_1 = again + mlp(again)
    out = Q(add_1)

P⁻¹ is made from P, operation by operation and with the shapes met on the way: ``again`` is ``add``, whatever Q may be.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

from torch.fx import Graph, Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.find.residual_adds import Candidate, Link
from mfx_passes.find.updates import restored, starts_before_relayout
from mfx_passes.ir import Chain
from mfx_passes.ops import rearrange, vocabulary
from mfx_passes.ops.joins import joined


@dataclass(frozen=True, eq=False)
class Span:
    """Sums between a rearrangement of the stream and what undoes it.

    Args:
        way: the state before it was rearranged, and step by step until the first sum reads it.
        ends: the rearranged states, one after each sum.
        out: the last state, put back; None if it is not, after the only sum.
    """

    way: tuple[Node, ...]
    ends: tuple[Node, ...]
    out: Node | None


@dataclass(frozen=True, eq=False)
class Detour:
    """Nodes inserted behind a state, first P⁻¹, then P."""

    state: Node
    nodes: tuple[Node, ...]

    def remove(self, graph: Graph) -> None:
        """Take the nodes out of the graph."""
        self.nodes[-1].replace_all_uses_with(self.state)
        for node in reversed(self.nodes):
            graph.erase_node(node)


def find_spans(candidates: Iterable[Candidate], index: GraphIndex) -> list[Span]:
    """Return the spans that are joined to other steps if their states are put back."""
    return [span for candidate in candidates for span in _spans(candidate, index)]


def insert_detours(spans: Iterable[Span], index: GraphIndex) -> list[Detour]:
    """Put the states of every span back and rearrange them again.

    Returns:
        The nodes that were inserted; the index is stale then.
    """
    return [detour for span in spans for detour in _insert_all(span, index)]


def remove_unused(detours: Iterable[Detour], chains: Sequence[Chain], graph: Graph) -> dict[Node, Node]:
    """Take out the detours that are in no chain; return the states of the others and what is read in their place."""
    used = {node for chain in chains for node in (*chain.starts, *chain.nodes)}
    kept = {}
    for detour in reversed(list(detours)):  # a later one may read shapes on the way of an earlier one
        if used.isdisjoint(detour.nodes):
            detour.remove(graph)
        else:
            kept[detour.state] = detour.nodes[-1]
    return kept


def _spans(candidate: Candidate, index: GraphIndex) -> Iterator[Span]:
    """Yield the spans of a candidate that have steps before or behind them; states outside of spans have one layout."""
    links, i = candidate.links, 0
    bases = starts_before_relayout(links[0], index)
    while i < len(links):
        span = next((span for base in bases if (span := _span(i, base, links, index))), None)
        count = len(span.ends) if span else 1
        if span and count < len(links):
            yield span
        i += count
        bases = [span.out if span and span.out else _end(links[i - 1])]


def _span(i: int, base: Node, links: Sequence[Link], index: GraphIndex) -> Span | None:
    path = links[i].add.skip_path
    moved = _moved(path[: path.index(base)], index)
    if not moved:
        return None
    ends: list[Node] = []
    for link, following in zip_longest(links[i:], links[i + 1 :]):
        ends.append(_end(link))
        if (out := restored(ends[-1], moved, link, index)) is not None:
            return Span(path[path.index(base) :: -1], tuple(ends), out)
        if following is None or _moved(_between(link, following), index):
            break
    # A single sum that no other one follows in its layout is put back, too, to be a step of the chain before it.
    return Span(path[path.index(base) :: -1], tuple(ends), None) if i > 0 and len(ends) == 1 else None


def _end(link: Link) -> Node:
    return link.tail[-1] if link.tail else link.add.node


def _between(link: Link, after: Link) -> tuple[Node, ...]:
    path = after.add.skip_path
    return path[: path.index(_end(link))]


def _moved(path: Sequence[Node], index: GraphIndex) -> list[tuple[object, ...] | None]:
    return [kind for node in reversed(path) if (kind := index.layout(node)) != vocabulary.NEUTRAL]


def _insert_all(span: Span, index: GraphIndex) -> Iterator[Detour]:
    way: Sequence[Node] = span.way
    for state in span.ends[:-1] if span.out else span.ends:
        detour, way = _insert(state, way, index)
        yield detour


def _insert(state: Node, way: Sequence[Node], index: GraphIndex) -> tuple[Detour, list[Node]]:
    """Insert a detour; return it, and its way from the state that was put back to the rearranged state."""
    readers = list(state.users)
    writer = _Writer(index.graph, state)
    value = state
    for before, node in reversed(list(pairwise(way))):
        value = _undo(node, before, value, writer, index)
    again = [value]
    for node in way[1:]:
        is_join = joined(node) is not None  # of pieces of another state
        again.append(again[-1] if is_join else writer.copy(node, {vocabulary.preserved(node): again[-1]}))
    for reader in readers:
        reader.replace_input_with(state, again[-1])
    return Detour(state, tuple(writer.nodes)), again


def _undo(node: Node, before: Node, value: Node, writer: _Writer, index: GraphIndex) -> Node:
    """Undo what ``node`` did to ``before``, for another ``value`` that is laid out as ``node`` is."""
    kind: Any = index.layout(node)
    if kind == vocabulary.NEUTRAL:
        return value
    if kind[0] in vocabulary.RESHAPES:
        shape = writer.write("call_function", getattr, (before, "shape"), node, _shape(before))
        return writer.write("call_method", "reshape", (value, shape), node, _value(before))
    name, *dims = kind
    if name == "rearrange":
        return _rearrange_back(node, before, value, writer, index)
    if name == "permute":
        dims = sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))
    return writer.write("call_method", name, (value, *dims), node, _value(before))


def _rearrange_back(node: Node, before: Node, value: Node, writer: _Writer, index: GraphIndex) -> Node:
    pattern = rearrange.pattern(node, index.modules)
    assert pattern is not None
    text, lengths, dims = pattern.inverse()
    shape = _shape(before)
    if dims:
        sizes = writer.write("call_function", getattr, (before, "shape"), node, shape)
        for axis, dim in dims.items():
            length = None if shape is None else shape[dim]
            lengths[axis] = writer.write("call_function", operator.getitem, (sizes, dim), node, length)
    return writer.write("call_function", rearrange.function(), (value, text), node, _value(before), lengths)


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _shape(node: Node) -> Any:
    return None if _value(node) is None else _value(node).shape


class _Writer:
    """A writer of nodes behind a node, one behind the other."""

    def __init__(self, graph: Graph, behind: Node) -> None:
        self._graph = graph
        self._last = behind
        self.nodes: list[Node] = []

    def write(
        self, op: str, target: Any, args: tuple[Any, ...], described_by: Node, value: Any, kwargs: Any = None
    ) -> Node:
        """Write a node that has a value, None if that is not known."""
        with self._graph.inserting_after(self._last):
            node = self._graph.create_node(op, target, args, kwargs)
        node.meta = {key: value for key, value in described_by.meta.items() if key != "val"}
        if value is not None:
            node.meta["val"] = value
        return self._appended(node)

    def copy(self, node: Node, replaced: dict[Node, Node]) -> Node:
        """Write a copy of a node that reads other nodes."""
        lookup: Callable[[Node], Node] = lambda source: replaced.get(source, source)  # noqa: E731
        with self._graph.inserting_after(self._last):
            return self._appended(self._graph.node_copy(node, lookup))

    def _appended(self, node: Node) -> Node:
        self._last = node
        self.nodes.append(node)
        return node
