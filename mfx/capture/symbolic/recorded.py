"""Nodes and arguments as a trace records them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate


def is_made_of_fields(mapping: Any) -> bool:
    """True if a mapping is a dataclass whose keys are names of fields, as Hugging Face models return them."""
    keys = set(mapping)
    return is_dataclass(mapping) and keys <= {field.name for field in fields(mapping)}


def to_nodes(args: Any) -> Any:
    """Return arguments with the nodes of proxies in their place."""
    return map_aggregate(args, lambda arg: arg.node if isinstance(arg, fx.Proxy) else arg)


def last_node(graph: fx.Graph) -> fx.Node | None:
    """Return the last node of a graph, None if it has none."""
    return next(iter(reversed(graph.nodes)), None)  # up to torch 2.12 what ``reversed`` returns is not an iterator


def nodes_after(graph: fx.Graph, last: fx.Node | None) -> Iterator[fx.Node]:
    """Yield the nodes of a graph behind the last one that was there; all if there was none."""
    node = next(iter(graph.nodes), None) if last is None else last.next
    while node is not None and node.op != "root":
        yield node
        node = node.next
