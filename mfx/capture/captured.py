"""The graph of a forward pass as it was captured, and the error where it cannot be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mfx.capture.binding import Binding
from mfx.capture.decisions import Decision
from mfx.capture.guards import TensorGuard, TieGuard
from mfx_passes import MfxError, ModuleCall
from mfx_passes.rewrite.portable_graph import PortableGraph, copy_graph, dump_calls, load_calls


class CaptureError(MfxError):
    """A model, or a call of it, that one route of capture cannot follow; another may."""


class PathsError(CaptureError):
    """The model decides on the values of tensors, and there cannot be a graph for each path."""


class RaisedError(CaptureError):
    """The model itself raises an error, the cause of this one, where the conditions of a call lead it."""


@dataclass(frozen=True)
class Effect:
    """A change of Python state that a model's forward makes and no graph records.

    Args:
        path: the path of the module whose forward makes it.
        name: the expression of what is changed.
        is_own: True if an attribute of that module, or of one inside of it, leads there.
    """

    path: str
    name: str
    is_own: bool


@dataclass(eq=False)
class Captured:
    """The graph of a forward pass, as the model wrote it.

    Args:
        graph: one placeholder per tensor argument.
        calls: the module calls that were walked through.
        walked: path and module of every module that was walked through; the graph holds for these modules only.
        binding: the calls that the graph serves, and how their arguments reach it.
        modules: modules that the graph calls and the model does not have.
        values: tensors without data by node name, where they are known: shapes, dtypes and devices.
        forward_only: True if the graph serves only calls in which no gradients are recorded.
        leaves: paths of modules that the graph calls as a whole because a trace cannot walk through them, and why.
        partial: True if the graph ends or begins at a graph break of the model.
        effects: what the model's forward changes in Python, if the graph does not.
        assigned: names of the attributes that this concerns, by module: the graph holds for any value of these.
        decisions: the conditions on values that the graph checks as it runs, in order.
        names: what the code mentions that may run: attributes, variables and strings.
        guards: conditions on tensors, by the path of what the graph reads under them.
    """

    graph: PortableGraph
    calls: list[ModuleCall]
    walked: dict[str, nn.Module]
    binding: Binding
    modules: dict[str, nn.Module] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    forward_only: bool = False
    leaves: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False
    effects: Sequence[Effect] = ()
    assigned: Mapping[nn.Module, set[str]] = field(default_factory=dict)
    decisions: Sequence[Decision] = ()
    names: frozenset[str] = frozenset()
    guards: Mapping[str, Sequence[TensorGuard | TieGuard]] = field(default_factory=dict)

    def modules_of(self, net: nn.Module) -> dict[str, nn.Module]:
        """Return all modules that the graph may call, by path."""
        return {**dict(net.named_modules()), **self.modules}

    def copy(self) -> tuple[PortableGraph, list[ModuleCall]]:
        """Return a copy of the graph to rewrite, and of its module calls; node names are the same."""
        graph = copy_graph(self.graph)
        for node in graph.nodes:
            if node.name in self.values:
                node.meta["val"] = self.values[node.name]
        return graph, load_calls(dump_calls(self.calls), graph)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "calls": dump_calls(self.calls),
            "values": {},
        }  # which can be neither copied nor dumped

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, calls=load_calls(state["calls"], state["graph"]))


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of a model's forward, as its class defines it."""
    return inspect.signature(type(model).forward.__get__(model))
