"""Nodes and arguments as a trace records them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from mfx.modules.holders import slots_of


def is_made_of_fields(mapping: Any) -> bool:
    """True if a mapping is a dataclass whose keys are names of fields, as Hugging Face models return them."""
    keys = set(mapping)
    return is_dataclass(mapping) and keys <= {field.name for field in fields(mapping)}


def is_of_attributes(value: Any) -> bool:
    """True for an object of a class written in Python that is nothing but its attributes."""
    cls: Any = type(value)
    if cls.__new__ is not object.__new__ or cls.__reduce_ex__ is not object.__reduce_ex__ or slots_of(cls):
        return False
    return hasattr(value, "__dict__") and not callable(value)


def to_nodes(args: Any) -> Any:
    """Return arguments with the nodes of proxies in their place, and classes in that of objects, which hold proxies."""

    def to_node(arg: Any) -> Any:
        if isinstance(arg, fx.Proxy):
            return arg.node
        return type(arg) if is_of_attributes(arg) else arg

    return map_aggregate(args, to_node)


def last_node(graph: fx.Graph) -> fx.Node | None:
    """Return the last node of a graph, None if it has none."""
    return next(iter(reversed(graph.nodes)), None)  # up to torch 2.12 what ``reversed`` returns is not an iterator


def nodes_after(graph: fx.Graph, last: fx.Node | None) -> Iterator[fx.Node]:
    """Yield the nodes of a graph behind the last one that was there; all if there was none."""
    node = next(iter(graph.nodes), None) if last is None else last.next
    while node is not None and node.op != "root":
        yield node
        node = node.next
