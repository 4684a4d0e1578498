"""Nodes cut out of a graph, as a graph of their own with explicit inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from torch.fx import Graph, Node

from mfx_passes.rewrite.portable_graph import PortableGraph

Lookup = Callable[[Node], Node]
Copy = Callable[[Graph, Node, Lookup], Node]


def boundary(nodes: Collection[Node]) -> tuple[list[Node], list[Node]]:
    """Return what nodes read from outside, in the order they read it, and those of them that are read outside."""
    own = set(nodes)
    inputs = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own)
    return list(inputs), [node for node in nodes if not own.issuperset(node.users)]


def extract(
    nodes: Iterable[Node],
    inputs: Sequence[Node],
    outputs: Iterable[Node],
    *,
    names: Sequence[str] | None = None,
    copy: Copy = Graph.node_copy,
) -> tuple[PortableGraph, dict[Node, Node]]:
    """Return a graph of copies of nodes, which takes ``inputs`` and returns a tuple of ``outputs``.

    Parameters and buffers that are neither inputs nor among the nodes are read by the graph itself. The metadata of
    nodes and inputs goes with them.

    Args:
        nodes: the nodes, in program order.
        inputs: what they read from outside.
        outputs: those whose values are returned.
        names: of the inputs, if not their own.
        copy: copies a node into the graph; it is given the graph, the node, and what returns the copies of its inputs.

    Returns:
        The graph, and the copies by what they are copies of.
    """
    graph = PortableGraph()
    copies = {
        node: graph.placeholder(name) for node, name in zip(inputs, names or [n.name for n in inputs], strict=True)
    }
    for node, copied in copies.items():
        copied.meta = dict(node.meta)

    def lookup(node: Node) -> Node:
        if node not in copies:
            assert node.op == "get_attr", node
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        copies[node] = copy(graph, node, lookup)
    graph.output(tuple(copies[node] for node in outputs))
    return graph, copies
