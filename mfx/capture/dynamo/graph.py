"""Put a graph as Dynamo writes it into the form of a symbolic trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Graph, Node

from mfx.capture.dynamo.mode_regions import fold_modes
from mfx.capture.dynamo.packing import name_packing
from mfx.capture.dynamo.sizes import read_sizes_off_inputs
from mfx.compat.dynamo import CHECKPOINT, with_plain_sizes

_REPEATED = re.compile(r"@\d+$")


def tidy(
    module: fx.GraphModule, paths: Sequence[str | None], path_of: Callable[[str, str], str | None]
) -> tuple[dict[str, nn.Module], tuple[int, ...]]:
    """Put a graph that Dynamo captured into the form that a symbolic trace has, in place.

    Parameters and buffers are read by their path in the model instead of being inputs; checkpointed functions are
    inlined; what runs in a grad, autocast or `torch.func` mode of its own becomes one call; packing is told from other
    reshapes; nodes have the paths of their modules.

    Args:
        module: the captured graph.
        paths: for each input of the graph, the path to read it by; None if it stays an input.
        path_of: returns the path of a module from Dynamo's names for it: its key in ``nn_module_stack``, its source.

    Returns:
        The modules that the graph needs beside the model's, and which of the inputs are still its inputs.
    """
    _inline_checkpoints(module)
    _bind_objects(module)
    read_sizes_off_inputs(module.graph)
    name_packing(module.graph)
    for node in module.graph.nodes:
        _describe(node, path_of)
    modules = dict(_gather_modules(module))
    _read_by_path(module.graph, paths)
    modules.update(fold_modes(module.graph))
    return modules, tuple(position for position, path in enumerate(paths) if path is None)


def _read_by_path(graph: Graph, paths: Sequence[str | None]) -> None:
    """Read parameters and buffers off the model."""
    for node, path in zip(graph.find_nodes(op="placeholder"), paths, strict=True):
        if path is None:
            continue
        with graph.inserting_after(node):
            read = graph.create_node("get_attr", path)
        read.meta = node.meta
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    _inputs_first(graph)


def _inputs_first(graph: Graph) -> None:
    """Placeholders before all other nodes, as `torch.fx` wants them."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        first.prepend(node)


def _describe(node: Node, path_of: Callable[[str, str], str | None]) -> None:
    """Give a node the metadata that the passes read: its modules by path, and a value with plain sizes."""
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {
        key: (path, kind)
        for key, (source, kind) in stack.items()
        if (path := path_of(_REPEATED.sub("", key), source)) is not None
    }
    value = with_plain_sizes(node.meta.get("example_value"))
    if value is not None:
        node.meta["val"] = value
        del node.meta["example_value"]  # which has a history, and so holds on to all of Dynamo's run


def _gather_modules(module: fx.GraphModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the graph reads off its own module: bodies of higher-order operations."""
    for node in module.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if isinstance(found := module._modules.get(target), nn.Module):
            yield target, found


def _bind_objects(module: fx.GraphModule) -> None:
    """Bind objects that are neither tensors nor modules to the calls that Dynamo does not trace into.

    Before::

        out = apply(self.callable, self.structure, x)

    After, as a call that no other compiler looks into either::

        out = call(x)

    """
    for node in module.graph.find_nodes(op="get_attr"):
        if str(node.target) not in module.__dict__:
            continue
        for user in list(node.users):
            leading = [arg for arg in user.args if isinstance(arg, Node) and str(arg.target) in module.__dict__]
            user.target = _holding(user.target, *(module.__dict__[str(arg.target)] for arg in leading))
            user.args = user.args[len(leading) :]
        module.graph.erase_node(node)


def _holding(function: Any, *objects: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function(*objects, *args)

    return torch.compiler.disable(call)  # type: ignore[no-any-return]


def _inline_checkpoints(module: fx.GraphModule) -> None:
    """Put the body of every function that the model checkpoints itself in the place of its call.

    Before::

        wrapped = tag_activation_checkpoint(wrap_body_0, x, weight)

    After::

        linear = F.linear(x, weight)

    """
    graph = module.graph
    for call in list(graph.nodes):
        if call.op != "call_function" or call.target is not CHECKPOINT:
            continue
        body = call.args[0]
        inner = getattr(module, str(body.target))
        _inline_checkpoints(inner)
        with graph.inserting_before(call):
            copies: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), call.args[1:], strict=True))
            outputs: Any = graph.graph_copy(inner.graph, copies)
        for node, copied in copies.items():
            if isinstance(copied, Node) and node.op not in ("placeholder", "get_attr"):
                copied.meta = dict(node.meta)
        for item in list(call.users):
            item.replace_all_uses_with(outputs[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(call)
        if not body.users:
            graph.erase_node(body)
