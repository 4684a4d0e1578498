"""The sizes that a trace has used as numbers: its graph is also for calls of other shapes that have the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from mfx.capture.captured import CaptureError
from mfx.capture.symbolic.call_values import CallValues, Length
from mfx.capture.symbolic.constants import Constants
from mfx_passes.rewrite.portable_graph import PortableGraph, copy_graph

_MOST = 1024  # shapes of which is known whether they fit


class SizesTaken:
    """The sizes that a trace has used as numbers, and how they are told.

    Args:
        inputs: the tensors that the trace was made for, by name.
        graph: returns the sizes, or what has these lengths; None if only these very shapes are known to have them.
        numbers: the sizes.
        constants: the tensors that the graph reads and the model does not have.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        graph: PortableGraph | None,
        numbers: tuple[Any, ...],
        constants: Constants,
    ) -> None:
        self._graph, self._numbers, self._constants = graph, numbers, constants
        self._shapes = _shapes(inputs)
        self._known: dict[Any, bool] = {}

    def are_those_of(self, net: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
        """True if a call of a net has the same ones; it is not run."""
        shapes = _shapes(inputs)
        if shapes == self._shapes or self._graph is None:
            return shapes == self._shapes
        if any(type(size) is not int for shape in shapes for size in shape):
            return False  # a symbol, as while the net is exported
        if shapes not in self._known:
            if len(self._known) == _MOST:
                self._known.clear()
            self._known[shapes] = self._has_them(net, inputs, self._graph)
        return self._known[shapes]

    def _has_them(self, net: nn.Module, inputs: Mapping[str, Tensor], graph: fx.Graph) -> bool:
        try:
            values = CallValues(net, inputs)
        except CaptureError:
            return False
        values.constants = self._constants
        values.find(graph)
        found: Any = graph.output_node().args[0]
        return all(map(_is_same, map(values.of, found), self._numbers))


def _shapes(inputs: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in inputs.values())


def _is_same(value: Any, number: Any) -> bool:
    if isinstance(number, Length):
        return isinstance(value, tuple | list | Tensor) and len(value) == number
    return type(value) is type(number) and bool(value == number)


def sizes_taken(model: nn.Module, graph: fx.Graph, values: CallValues, *, exactly: bool) -> SizesTaken | None:
    """Return the sizes that a trace has used as numbers, or in which an operation fails; None if there are none.

    Args:
        model: the model that was traced.
        graph: the graph of the trace.
        values: what the trace knew of the call that it was made for.
        exactly: True if other shapes never do.
    """
    if values.is_exact or (exactly and values.numbers):
        return SizesTaken(values.inputs, None, (), values.constants)
    if not values.numbers:
        return None
    wanted, copies, told = set(values.numbers), dict[fx.Node, fx.Node](), fx.Graph()
    for node in reversed(graph.nodes):
        wanted.update(node.all_input_nodes if node in wanted else ())
    for node in graph.nodes:
        if node in wanted and _is_told(node, model):
            copies[node] = told.node_copy(node, lambda of: copies.get(of, of))
    if any(node not in copies for node in wanted):  # for one, it is no longer part of the graph
        return SizesTaken(values.inputs, None, (), values.constants)
    told.output(tuple(copies[node] for node in values.numbers))
    return SizesTaken(values.inputs, copy_graph(told), tuple(values.numbers.values()), values.constants)


def _is_told(node: fx.Node, model: nn.Module) -> bool:
    """True if a run on tensors without data tells the shape of a node's value, and does nothing else."""
    if node.op != "call_module":
        return True
    module = model.get_submodule(str(node.target))
    return type(module).__module__.startswith("torch.nn.") and "forward" not in module.__dict__
