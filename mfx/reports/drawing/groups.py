"""A graph seen from afar: nodes with one key become one group, and sizes are left out."""

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
    """Nodes that are shown as one thing.

    Args:
        key: what they have in common; None for a node by itself.
        nodes: in the graph's order.
        inputs: the groups that they read, in the order in which they first do.
    """

    key: str | None
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Group] = field(default_factory=list)

    @property
    def first(self) -> Node:
        """The node that stands first in the graph."""
        return self.nodes[0]


def contract(graph: Graph, key: Callable[[Node], str | None], *, hide: Callable[[Node], bool]) -> list[Group]:
    """The groups of a graph in an order in which each comes after what it reads.

    Nodes join a group of their key unless that would close a circle of groups. What is computed from sizes alone, and
    attributes of the model, are in no group.

    Args:
        graph: any graph; the output node makes a group of its own.
        key: what a node has in common with others; None for nothing.
        hide: nodes to leave out, with what is computed from them alone.
    """
    contractor = _Contractor(key)
    hidden = _hidden(graph, hide)
    for node in graph.nodes:
        if node not in hidden:
            contractor.add(node)
    return _ordered(contractor.groups)


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
    """Whether it makes numbers of numbers, and no tensor of them."""
    if node.op != "call_function":
        return False
    module = getattr(node.target, "__module__", None) or ""
    return module in (operator.__name__, "_operator", "builtins", "math") or node.target is torch._assert


class _Contractor:
    def __init__(self, key: Callable[[Node], str | None]) -> None:
        self.groups: list[Group] = []
        self._key = key
        self._of: dict[Node, Group] = {}
        self._latest: dict[str, Group] = {}

    def add(self, node: Node) -> None:
        key = self._key(node)
        read = list(dict.fromkeys(self._of[source] for source in node.all_input_nodes if source in self._of))
        group = self._latest.get(key) if key is not None else None
        if group is None or any(_reaches(group, other) for other in read if other is not group):
            group = Group(key)
            self.groups.append(group)
            if key is not None:
                self._latest[key] = group
        group.nodes.append(node)
        group.inputs += [other for other in read if other is not group and other not in group.inputs]
        self._of[node] = group


def _reaches(start: Group, end: Group) -> bool:
    """Whether ``end`` reads, directly or not, what ``start`` computes."""
    seen: set[int] = set()
    todo = [end]
    while todo:
        group = todo.pop()
        if group is start:
            return True
        if id(group) not in seen:
            seen.add(id(group))
            todo += group.inputs
    return False


def _ordered(groups: list[Group]) -> list[Group]:
    """Each behind what it reads, and right behind what it reads first: the stream through a model stays together."""
    ordered: dict[Group, None] = {}
    for last in sorted(groups, key=lambda group: group.first.op != "output"):
        todo = [last]
        while todo:
            waiting = [source for source in todo[-1].inputs if source not in ordered]
            if waiting:
                todo.append(next((source for source in waiting if not source.inputs), waiting[-1]))
            else:
                ordered[todo.pop()] = None
    return list(ordered)
