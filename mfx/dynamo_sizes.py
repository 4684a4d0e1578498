"""Sizes in a graph of Dynamo's: read off its inputs, so that they do not hang on the tensor that was asked."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

__all__ = ["read_sizes_off_inputs"]


def read_sizes_off_inputs(graph: Graph) -> None:
    """Sizes that Dynamo knows to be a number, or one of the graph's inputs, are that, whichever tensor was asked.

    Before::

        size = embeddings.size(); length = size[1]; positions = arange(length)

    After::

        positions = arange(s27)

    So what is computed of sizes alone (positions, masks) does not hang on the stream that was asked.
    """
    known: dict[Any, Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("example_value")
        if not isinstance(value, torch.SymInt):
            continue
        size = value.node.expr
        if node.op == "placeholder":
            known.setdefault(size, node)
        elif size.is_number or size in known:
            _replace(node, int(size) if size.is_number else known[size])
    for node in reversed(graph.find_nodes(op="call_method", target="size")):
        if not node.users:
            graph.erase_node(node)


def _replace(node: Node, value: Any) -> None:
    for user in list(node.users):
        user.args = map_arg(user.args, lambda other: value if other is node else other)
        user.kwargs = map_arg(user.kwargs, lambda other: value if other is node else other)
    node.graph.erase_node(node)
