"""From a model to a graph of its forward pass, or to a reason why there is none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from mfx_passes import MfxError, ModuleCall
from mfx_passes.rewrite.portable_graph import PortableGraph, copy_graph, dump_calls, load_calls

if TYPE_CHECKING:
    GuardedCall = Any


class CaptureError(MfxError):
    """A model, or a call of it, that one way of capturing cannot follow; another way may."""


@dataclass(frozen=True)
class Specialization:
    """How the arguments of a forward pass are split: tensors go through the graph, the rest is fixed in it.

    Args:
        inputs: names of the arguments that are tensors, in the order of the signature.
        constants: names and values of the others.
    """

    inputs: tuple[str, ...]
    constants: Mapping[str, Any]


@dataclass(eq=False)
class Captured:
    """The graph of a forward pass, as the model wrote it.

    Args:
        graph: one placeholder per tensor argument.
        calls: the module calls that were walked through.
        walked: path and module of every module that was walked through; the graph holds for these modules only.
        specialization: what the graph takes and what is fixed in it.
        modules: modules that the graph calls and the model does not have.
        values: tensors without data by node name, where they are known: shapes, dtypes and devices.
        frame: the call that it was captured from, if Dynamo did; the graph holds under its conditions only.
        forward_only: whether one of these is that no gradients are recorded.
    """

    graph: PortableGraph
    calls: list[ModuleCall]
    walked: dict[str, nn.Module]
    specialization: Specialization
    modules: dict[str, nn.Module] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    frame: GuardedCall | None = None
    forward_only: bool = False

    def modules_of(self, net: nn.Module) -> dict[str, nn.Module]:
        """Everything the graph may call, by path."""
        return {**dict(net.named_modules()), **self.modules}

    def copy(self) -> tuple[PortableGraph, list[ModuleCall]]:
        """A graph to rewrite, and its calls; node names are the same."""
        graph = copy_graph(self.graph)
        for node in graph.nodes:
            if node.name in self.values:
                node.meta["val"] = self.values[node.name]
        return graph, load_calls(dump_calls(self.calls), graph)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": dump_calls(self.calls)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, calls=load_calls(state["calls"], state["graph"]))


def signature_of(model: nn.Module) -> inspect.Signature:
    """The arguments of a model's forward, as its class defines them."""
    return inspect.signature(type(model).forward.__get__(model))
