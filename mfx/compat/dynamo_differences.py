"""Differences between a graph of TorchDynamo's and the model: those that are mended, and those that are refused.

All was read in torch 2.13 to 2.14.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo.utils import numpy_method_wrapper, numpy_operator_wrapper, numpy_to_tensor_wrapper
from torch.utils import _pytree as pytree

_TOLD = "mfx.requires_grad_set"  # in the metadata of nodes


@contextmanager
def own_tensors_may_require_gradients() -> Iterator[None]:
    """Leave ``tensor.requires_grad = True`` out of the graph where the model has made the tensor itself.

    T5 and Wav2Vec2 set it for their checkpoints. Dynamo breaks the graph there.
    Only the tensor's own gradient depends on it, and the model would have to ask for that one; code that reads
    ``requires_grad`` sees True. See `check_gradients_returned` for what remains.
    """
    from torch._dynamo.variables import builtin

    assigning = getattr(builtin, "SetAttrBuiltinVariable", None)
    if assigning is None:  # before torch 2.13
        yield
        return
    assign = assigning._call_setattr

    def pass_over(self: Any, tx: Any, tensor: Any, name: Any, value: Any) -> Any:
        if tensor.is_tensor() and tensor.source is None and _says(name, "requires_grad") and _says(value, True):
            node = tensor.as_proxy().node
            if not tensor.requires_grad:
                node.meta["example_value"].requires_grad_()
                node.meta[_TOLD] = tensor.requires_grad = True
            return value
        return assign(self, tx, tensor, name, value)

    with patch.object(assigning, "_call_setattr", pass_over):
        yield


def check_gradients_returned(graph: fx.Graph) -> None:
    """Check that what the graph returns requires gradients as in the model, or a caller could tell the difference."""
    told: set[fx.Node] = set()  # with what is computed from these
    anyway: set[fx.Node] = set()
    for node in graph.nodes:
        if _TOLD in node.meta or not told.isdisjoint(node.all_input_nodes):
            told.add(node)
        source = node.op in ("placeholder", "get_attr") or not anyway.isdisjoint(node.all_input_nodes)
        if source and _requires_grad(node) and _TOLD not in node.meta:
            anyway.add(node)
    for node in graph.output_node().all_input_nodes:
        if node in told and _requires_grad(node) and node not in anyway:
            raise torch._dynamo.exc.TorchDynamoException(
                f"{node.name} is returned, and requires a gradient only because its requires_grad is set"
            )


def check_draws(output: Any) -> None:
    """Check that random numbers are drawn in every call, and from where the model draws them.

    Dynamo draws from torch's generator what the model draws from numpy's, and would set a generator of the model's own
    to the state after this one call.
    """
    functions = (getattr(node.target, "f", None) for node in output.backend_input.graph_module.graph.nodes)
    if any(getattr(function, "__module__", "") == "torch._numpy.random" for function in functions):
        raise _drawn("numpy's generator")
    check_generators(output.graph_capture_output.bytecode)


def check_generators(code: CodeType) -> None:
    """Check that code that Dynamo wrote does not set a generator of the model's own to what one call left."""
    if any(instruction.argval == "setstate" for instruction in dis.get_instructions(code)):
        raise _drawn("a generator of its own (random.Random)")


def _drawn(generator: str) -> Exception:
    what = f"it draws random numbers from {generator}, which TorchDynamo does not"
    return torch._dynamo.exc.TorchDynamoException(what)


def check_numpy(graph: fx.Graph) -> None:
    """Check that numpy computes nothing of tensors' values: Dynamo has torch do it, whose last bits are others."""
    wrappers = (numpy_to_tensor_wrapper, numpy_method_wrapper, numpy_operator_wrapper)
    of_call: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not of_call.isdisjoint(node.all_input_nodes):
            of_call.add(node)
        if isinstance(node.target, wrappers) and node in of_call:
            raise torch._dynamo.exc.TorchDynamoException(
                f"numpy computes {node.name} of the values of tensors, which TorchDynamo would leave to torch"
            )


def _requires_grad(node: fx.Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("example_value"))
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


@contextmanager
def checkpoints_are_calls() -> Iterator[None]:
    """Capture what the model checkpoints itself as plain calls: a graph of its own could not write outside it."""
    from torch._dynamo.variables.higher_order_ops import CheckpointHigherOrderVariable
    from torch._higher_order_ops.wrap import TagActivationCheckpoint

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        _, own = TagActivationCheckpoint.divide_kwargs(kwargs)
        return args[0].call_function(tx, args[1:], own)

    with patch.object(CheckpointHigherOrderVariable, "_call_function", call):
        yield


def _says(variable: Any, value: Any) -> bool:
    return variable.is_python_constant() and bool(variable.as_python_constant() == value)
