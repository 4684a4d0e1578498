"""Operations by which a model differentiates in its own forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from mfx_passes.ops.vocabulary import Modules

_OF_TRANSFORM = "_autograd_grad"  # what torch.func.vjp calls behind its transform, by TorchDynamo


def differentiates(node: Node, modules: Modules) -> bool:
    """True if an operation computes gradients.

    A module that mfx made says so by its attribute ``_mfx_differentiates``.

    Args:
        node: the node.
        modules: the modules that nodes call.
    """
    if node.op == "call_module":  # getattr may find any name in a user's
        return bool(getattr(modules.get(str(node.target)), "__dict__", {}).get("_mfx_differentiates"))
    return node.target is torch.autograd.grad or getattr(node.target, "__name__", "") == _OF_TRANSFORM


def through_others(nodes: set[Node], modules: Modules) -> Node | None:
    """Return one of some nodes that computes other gradients when they run alone than in their graph, None without one.

    A path from what it differentiates by to what it differentiates may then lead through nodes that are not among them.
    That is not known of parameters, which modules read anywhere; and what a torch.func transform saves, nothing
    rebuilds.

    Args:
        nodes: the nodes.
        modules: the modules that they call.
    """
    return next((node for node in nodes if differentiates(node, modules) and not _is_alone(node, nodes)), None)


def _is_alone(node: Node, nodes: set[Node]) -> bool:
    if node.target is not torch.autograd.grad:
        return False
    outputs, inputs = _argument(node, 0, "outputs"), set(_argument(node, 1, "inputs"))
    if any(each.op == "get_attr" for each in inputs):
        return False
    border = {source for each in _upwards(outputs, nodes) for source in each.all_input_nodes} - nodes
    border |= {each for each in outputs if each not in nodes}
    return all(inputs.isdisjoint(_upwards(each.all_input_nodes)) for each in border)


def _argument(node: Node, position: int, name: str) -> list[Node]:
    given: Any = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Node)]


def _upwards(nodes: Iterable[Node], within: set[Node] | None = None) -> Iterator[Node]:
    """Yield nodes and all that they are computed from, but for what is not within a set."""
    seen: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen and (within is None or node in within):
            seen.add(node)
            yield node
            todo += node.all_input_nodes
