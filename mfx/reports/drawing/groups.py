"""The groups of a graph: nodes with the same key become one group, and sizes are left out."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

_SIZE_METHODS = frozenset(
    {"size", "dim", "numel", "stride", "ndimension", "element_size", "data_ptr", "storage_offset"}
)
_SIZE_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "itemsize"})


@dataclass(eq=False)
class Group:
    """Nodes that are drawn as one thing.

    Args:
        key: what the nodes have in common; None for a node by itself.
        nodes: in the graph's order.
        inputs: the groups that the nodes read, in the order of the first read.
    """

    key: str | None
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Group] = field(default_factory=list)

    @property
    def first(self) -> Node:
        """The first of the nodes."""
        return self.nodes[0]


def contract(graph: Graph, key: Callable[[Node], str | None], *, hide: Callable[[Node], bool]) -> list[Group]:
    """Return the groups of a graph, each after the groups that it reads.

    A node joins the latest group of its key, unless that would close a cycle of groups: then it starts another one.
    (A condensation of the cycle would draw all groups on it as one.) Attributes of the model, and what is computed from
    sizes alone, are in no group.

    Args:
        graph: any graph; the output node makes a group of its own.
        key: returns what a node has in common with others; None for nothing.
        hide: True for nodes to leave out, with what is computed from them alone.
    """
    import networkx as nx

    hidden = _hidden(graph, hide)
    reads: nx.DiGraph[Group] = nx.DiGraph()
    group_of: dict[Node, Group] = {}
    latest: dict[str, Group] = {}
    for node in graph.nodes:
        if node in hidden:
            continue
        shared = key(node)
        group = None if shared is None else latest.get(shared)
        sources = dict.fromkeys(group_of[source] for source in node.all_input_nodes if source in group_of)
        if group is None or any(nx.has_path(reads, source, group) for source in sources if source is not group):
            group = Group(shared)
            reads.add_node(group)
            if shared is not None:
                latest[shared] = group
        group.nodes.append(node)
        group_of[node] = group
        reads.add_edges_from([(group, source) for source in sources if source is not group])
    for group in reads:
        group.inputs = list(reads[group])
    return _ordered(list(reads))


def _ordered(groups: list[Group]) -> list[Group]:
    """Sort each group behind what it reads, right behind what it reads first: the model's stream stays together."""
    import networkx as nx

    reads: nx.DiGraph[Group] = nx.DiGraph()
    reads.add_nodes_from(sorted(groups, key=lambda group: group.first.op != "output"))
    for group in groups:
        reads.add_edges_from([(group, source) for source in group.inputs if not source.inputs])
        reads.add_edges_from([(group, source) for source in reversed(group.inputs) if source.inputs])
    return list(nx.dfs_postorder_nodes(reads))


def _hidden(graph: Graph, hide: Callable[[Node], bool]) -> set[Node]:
    hidden: set[Node] = set()
    attributes: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            attributes.add(node)
        elif hide(node) or _reads_size(node):
            hidden.add(node)
        elif node.op not in ("placeholder", "output"):
            read = [source for source in node.all_input_nodes if source not in attributes]
            if read and all(source in hidden for source in read) and _is_plain(node):
                hidden.add(node)
    return hidden | attributes


def _reads_size(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op == "placeholder":
        return isinstance(node.meta.get("val", node.meta.get("example_value")), int | torch.SymInt)
    return node.target is getattr and len(node.args) > 1 and node.args[1] in _SIZE_ATTRIBUTES


def _is_plain(node: Node) -> bool:
    """True if a node computes numbers from numbers, and never a tensor."""
    if node.op != "call_function":
        return False
    module = getattr(node.target, "__module__", None) or ""
    return module in (operator.__name__, "_operator", "builtins", "math") or node.target is torch._assert
