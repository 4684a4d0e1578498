"""Regions of a captured graph that run in a mode of the model's own, folded into calls."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Graph, Node

from mfx import compat
from mfx.compat.dynamo_modes import DIFFERENTIATIONS, ENTRANCES, EXITS, HOOK_SWITCHES, SWITCHES
from mfx.modules.uninterrupted import must_finish
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutation, Mutations
from mfx_passes.rewrite.extract import boundary, extract


class OtherMode(nn.Module):
    """A region of a model that runs in a mode of its own (grad, autocast, …), which it enters and leaves.

    For `mfx_passes`, its attribute ``_mfx_writes`` has the positions of the arguments that it changes in place, and
    ``_mfx_differentiates`` is True if it is within a torch.func transform that computes gradients.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.body = fx.GraphModule(nn.Module(), graph)
        changed = {node for change in _changes(graph) for node in change.family}
        self._mfx_writes = [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in changed]
        self._mfx_differentiates = any(node.target in DIFFERENTIATIONS for node in graph.nodes)

    def forward(self, *args: Any) -> Any:
        """Run the region; the mode is the caller's again afterwards, also after an error."""
        if not torch.compiler.is_compiling():  # compiled code runs as a whole
            with compat.modes_left(), must_finish():
                return self.body(*args)
        grad = torch.is_grad_enabled()
        try:
            return self.body(*args)
        finally:
            torch.set_grad_enabled(grad)


def _changes(graph: Graph) -> list[Mutation]:
    return Mutations(index := GraphIndex(graph, {})).at(index.nodes)


def fold_modes(graph: Graph) -> Iterator[tuple[str, nn.Module]]:
    """Make one call of everything between the entrance to and the exit from another mode.

    Before::

        _set_grad_enabled(False); cos = angles.cos(); _set_grad_enabled(True)

    After::

        cos = other_mode_0(angles)

    A torch.func transform also forbids hooks on saved tensors, which mfx has none of where one is.
    """
    for node in [node for node in graph.nodes if node.target in HOOK_SWITCHES]:
        graph.erase_node(node)
    for number, region in enumerate(_regions(graph)):
        name = f"other_mode_{number}"
        yield name, _fold(graph, region, name)


def _regions(graph: Graph) -> list[list[Node]]:
    """Return the nodes from each entrance to the exit that belongs to it; of nested regions, the outermost."""
    regions: list[list[Node]] = []
    open_region: list[Node] = []
    depth = 0
    for node in graph.nodes:
        change = _change_of_depth(node, depth, open_region)
        if depth or change > 0:
            open_region.append(node)
        depth += change
        if depth == 0 and open_region:
            regions.append(open_region)
            open_region = []
    return regions


def _change_of_depth(node: Node, depth: int, inside: list[Node]) -> int:
    if node.target in ENTRANCES:
        return 1
    if node.target in EXITS:
        return -1
    if node.target in SWITCHES:
        earlier = [other for other in inside if other.target is node.target]
        return -1 if len(earlier) % 2 else 1
    return 0


def _fold(graph: Graph, nodes: list[Node], name: str) -> OtherMode:
    nodes = [node for node in nodes if node.op != "get_attr"]
    own = set(nodes)
    inputs, outputs = boundary(nodes)
    body, _ = extract(nodes, inputs, outputs)
    with graph.inserting_after(nodes[-1]):
        call = graph.create_node("call_module", name, tuple(inputs))
    call.meta = {key: nodes[0].meta[key] for key in ("nn_module_stack", "stack_trace") if key in nodes[0].meta}
    last = call
    for position, node in enumerate(outputs):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, position))
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in own)
    for node in reversed(nodes):
        graph.erase_node(node)
    return OtherMode(body)
