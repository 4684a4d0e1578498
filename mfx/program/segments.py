"""A rewritten graph as segments between its momentum calls, or blocks among these, each compiled on its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.fx import Graph, Node

from mfx_passes.ir import block_of, is_momentum_call
from mfx_passes.rewrite.extract import boundary, extract
from mfx_passes.rewrite.portable_graph import PortableGraph

T = TypeVar("T")


def split_between_calls(
    graph: Graph,
    compiled: Callable[[Graph], T] | None,
    runs: Sequence[Sequence[Node]] | None = None,
    *,
    blocks: Callable[[Graph], T] | None = None,
) -> tuple[Graph, dict[str, T]]:
    """Put one call in the place of all nodes between two momentum calls, or of each block there.

    Before::

        h = embed(x); y = momentum_blocks(h); z = norm(y); return head(z)

    After::

        h = segment_0(x); y = momentum_blocks(h); return segment_1(y)

    Args:
        graph: the rewritten graph; it is left as it is.
        compiled: makes a function of ``(root, *inputs)`` from a segment's graph; None: its nodes stay as they are.
        runs: the nodes of each segment; by default what lies between two momentum calls.
        blocks: the same for blocks, see `mfx_passes.find.blocks`, which are then segments of their own; None: they are
            not told apart.

    Returns:
        The short graph, and its segments by name: functions of ``(root, *inputs)``, where the root holds what the graph
        reads by path. The short graph calls them without the root.
    """
    short = PortableGraph()
    copies: dict[Node, Any] = {}
    segments: dict[str, T] = {}

    def copy(node: Node) -> Any:
        if node not in copies:
            assert node.op == "get_attr"
            copies[node] = short.node_copy(node)
        return copies[node]

    for kind, nodes in _runs(graph, with_blocks=blocks is not None) if runs is None else _around(graph, runs):
        make = compiled if kind == "segment" else None if kind == "node" else blocks
        if make is not None:
            name = f"segment_{len(segments)}"
            sources, outputs = boundary(nodes)
            inputs = [source for source in sources if source.op != "get_attr"]
            body, _ = extract(nodes, inputs, outputs)
            segments[name] = make(body)
            call = short.create_node("call_module", name, tuple(map(copy, inputs)))
            for position, node in enumerate(outputs):
                copies[node] = short.call_function(operator.getitem, (call, position))
            continue
        for node in nodes:
            copies[node] = short.node_copy(node, copy)
    return short, segments


def _runs(graph: Graph, *, with_blocks: bool) -> list[tuple[str, Sequence[Node]]]:
    """Return all nodes of a graph in order, in runs of one kind: "node", "segment", or "block" with its path."""
    runs: list[tuple[str, list[Node]]] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue  # read where it is needed
        kind = "node" if node.op in ("placeholder", "output") or is_momentum_call(node) else "segment"
        if with_blocks and kind == "segment" and (path := block_of(node)) is not None:
            kind = f"block {path}"
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(node)
        else:
            runs.append((kind, [node]))
    return [*runs]


def _around(graph: Graph, runs: Sequence[Sequence[Node]]) -> list[tuple[str, Sequence[Node]]]:
    """Return all nodes of a graph in order; the runs contain every computed node."""
    inputs, outputs = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    return [("node", inputs), *(("segment", run) for run in runs), ("node", outputs)]
