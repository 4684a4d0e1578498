"""A rewritten graph as segments between its momentum calls, each compiled on its own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mfx_passes.ir import is_momentum_call
from mfx_passes.serialize import PortableGraph

__all__ = ["cut"]

Compile = Callable[[Graph], Callable[..., Any]]


def cut(graph: Graph, compiled: Compile) -> tuple[Graph, dict[str, Callable[..., Any]]]:
    """Put one call in the place of all nodes between two momentum calls.

    Before::

        h = embed(x); y = momentum_blocks(h); z = norm(y); return head(z)

    After::

        h = segment_0(x); y = momentum_blocks(h); return segment_1(y)

    Args:
        graph: the rewritten graph; it is left as it is.
        compiled: makes a function of ``(root, *inputs)`` of a segment's graph.

    Returns:
        The short graph, and its segments by name: functions of ``(root, *inputs)``, where the root holds what the graph
        reads by path. The short graph calls them without it.
    """
    short = PortableGraph()
    copies: dict[Node, Any] = {}
    segments: dict[str, Callable[..., Any]] = {}

    def copy(node: Node) -> Any:
        if node not in copies:
            assert node.op == "get_attr"
            copies[node] = short.node_copy(node)
        return copies[node]

    for kind, nodes in _runs(graph):
        if kind == "segment":
            name = f"segment_{len(segments)}"
            body, inputs, outputs = _body(nodes)
            segments[name] = compiled(body)
            call = short.create_node("call_module", name, tuple(map(copy, inputs)))
            for position, node in enumerate(outputs):
                copies[node] = short.call_function(operator.getitem, (call, position))
            continue
        for node in nodes:
            copies[node] = short.node_copy(node, copy)
    return short, segments


def _runs(graph: Graph) -> list[tuple[str, list[Node]]]:
    runs: list[tuple[str, list[Node]]] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue  # read where it is needed
        kind = "node" if node.op in ("placeholder", "output") or is_momentum_call(node) else "segment"
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(node)
        else:
            runs.append((kind, [node]))
    return runs


def _body(nodes: Collection[Node]) -> tuple[Graph, list[Node], list[Node]]:
    """Nodes as a graph of their own, what it takes and what it gives."""
    own = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own)
    inputs = [source for source in sources if source.op != "get_attr"]
    outputs = [node for node in nodes if any(user not in own for user in node.users)]
    body = PortableGraph()
    copies = {source: body.placeholder(source.name) for source in inputs}
    copies.update((source, body.node_copy(source)) for source in sources if source.op == "get_attr")
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(tuple(map_arg(tuple(outputs), copies.__getitem__)))
    return body, inputs, outputs
