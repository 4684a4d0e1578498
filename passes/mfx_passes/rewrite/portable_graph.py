"""Graphs that pickle at any size: a plain graph links its nodes in a row, which pickle follows recursively."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from mfx_passes.errors import MfxError
from mfx_passes.ir import ModuleCall

_OPERATORS = (type(torch.ops.aten.relu), type(torch.ops.aten.relu.default))
_KEPT_META = ("nn_module_stack", "stack_trace", "custom")


@dataclass(frozen=True)
class _Reference:
    name: str


@dataclass(frozen=True)
class _Functional:
    """A function of ``torch.nn.functional`` that pickle does not find by its name, such as ``max_pool2d``."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator of ``torch.ops``, which pickle does not know, by its names there: ``aten``, ``relu``, ``default``."""

    names: tuple[str, ...]


class PortableGraph(Graph):
    """A graph that is pickled and copied as a list of rows; of the metadata, only descriptions go with it.

    Attributes:
        replaceable: True if its holder makes it anew where it is empty; else it is an error if it cannot be pickled.
    """

    replaceable = False

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            return _unpickled, (pickle.dumps(_dump(self)),)
        except Exception as error:  # of many types: whatever an object says that is not to be pickled
            if self.replaceable:
                return PortableGraph, ()
            raise MfxError(
                f"a rewritten graph holds an object that cannot be pickled ({error}). Save the state_dict() of the "
                "module, and make the module anew where it is loaded"
            ) from error

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> PortableGraph:
        copied = copy_graph(self)
        if memo is not None:
            memo[id(self)] = copied
        return copied


def portable(rows: list[tuple[Any, ...]]) -> PortableGraph:
    """Return the graph that these rows describe, with the same node names."""
    graph = PortableGraph()
    nodes: dict[str, Node] = {}
    lookup = _lookup(nodes)
    for op, name, target, args, kwargs, annotation, meta in rows:
        args, kwargs, target = map_aggregate(args, lookup), map_aggregate(kwargs, lookup), _imported(target)
        nodes[name] = graph.create_node(op, target, args, kwargs, name, annotation)
        nodes[name].meta.update(meta)
    return graph


def _unpickled(rows: bytes) -> PortableGraph:
    return portable(pickle.loads(rows))


def is_portable(graph: Graph, calls: Sequence[ModuleCall] = ()) -> bool:
    """True if a graph, and module calls in it, can be pickled: all objects that it holds can."""
    try:
        pickle.dumps((_dump(graph), dump_calls(calls)))
    except Exception:  # of many types
        return False
    return True


def copy_graph(graph: Graph) -> PortableGraph:
    """Return a copy with the same node names."""
    return portable(_dump(graph))


def _dump(graph: Graph) -> list[tuple[Any, ...]]:
    return [
        (
            node.op,
            node.name,
            _importable(node.target),
            map_aggregate(node.args, _to_reference),
            map_aggregate(node.kwargs, _to_reference),
            node.type,
            {key: node.meta[key] for key in _KEPT_META if key in node.meta},
        )
        for node in graph.nodes
    ]


def dump_calls(calls: Sequence[ModuleCall]) -> list[tuple[Any, ...]]:
    """Return module calls as picklable rows; see `load_calls`."""
    return [
        (
            call.target,
            map_aggregate(call.args, _to_reference),
            map_aggregate(call.kwargs, _to_reference),
            map_aggregate(call.output, _to_reference),
            [node.name for node in call.nodes],
        )
        for call in calls
    ]


def load_calls(rows: list[tuple[Any, ...]], graph: Graph) -> list[ModuleCall]:
    """Return the module calls that `dump_calls` was given, in terms of the nodes of ``graph``."""
    nodes = {node.name: node for node in graph.nodes}
    lookup = _lookup(nodes)
    return [
        ModuleCall(
            target,
            map_aggregate(args, lookup),
            map_aggregate(kwargs, lookup),
            map_aggregate(output, lookup),
            frozenset(nodes[name] for name in names),
        )
        for target, args, kwargs, output, names in rows
    ]


def _importable(target: Any) -> Any:
    if isinstance(target, _OPERATORS):
        return _Operator(tuple(str(target).split(".")))
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    return next((_Functional(name) for name, function in vars(F).items() if function is target), target)


def _imported(target: Any) -> Any:
    if isinstance(target, _Operator):
        return reduce(getattr, target.names, torch.ops)
    return getattr(F, target.name) if isinstance(target, _Functional) else target


def _to_reference(arg: Any) -> Any:
    return _Reference(arg.name) if isinstance(arg, Node) else arg


def _lookup(nodes: dict[str, Node]) -> Callable[[Any], Any]:
    return lambda arg: nodes[arg.name] if isinstance(arg, _Reference) else arg
