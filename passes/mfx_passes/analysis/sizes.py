"""Sizes of states: all states of a stream share them, so they can be read off its first one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.fx import Graph, Node

from mfx_passes.ir import Chain, Step

# All states of a stream have one shape, dtype and device, but each its own strides and history.
_NOT_SHARED = frozenset({"stride", "requires_grad"})


def is_shared_size(size: Node) -> bool:
    """True if a size of one state is that of all states."""
    return (size.args[1] if size.target is getattr else size.target) not in _NOT_SHARED


def is_state_size(node: Node, states: Collection[Node], sizes: Collection[Node]) -> bool:
    """True if a node is computed only from sizes of states."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        if node not in sizes or not is_shared_size(node):
            return False
        sources = {source for source in node.all_input_nodes if source not in states} - seen
        seen |= sources
        todo += sources
    return True


def read_sizes_at_start(graph: Graph, chain: Chain, sizes: set[Node], around: Sequence[Step] = ()) -> None:
    """Have sizes of a chain's states read off its streams' starts, outside and by steps that read another step's state.

    The new nodes belong to the steps ``around`` the chain, if it lies in the branch of another one.

    Before::

        shape = x1.shape             # in step 1, and read in step 2 as well

    After::

        shape_start = x0.shape       # before the chain; step 2 captures it

    """
    starts = chain.starts
    first = dict(zip(starts, starts, strict=True)) | {update.out: starts[update.stream] for update in chain.updates}
    copies: dict[Node, Node] = {}

    def copy(node: Node) -> Node:
        if node in first:
            return first[node]
        if node not in copies:
            after = max(map(copy, node.all_input_nodes))
            with graph.inserting_after(after):
                copies[node] = graph.node_copy(node, copy)
            sizes.add(copies[node])
            for step in around:
                step.nodes.add(copies[node])
        return copies[node]

    owners = {node: step for step in chain.steps for node in step.nodes}
    for step in chain.steps:
        for node in sorted(step.nodes):
            for source in node.all_input_nodes:
                elsewhere = source not in step.nodes and (
                    source in owners or first.keys() & set(source.all_input_nodes)
                )
                if elsewhere and is_state_size(source, first, sizes):
                    node.replace_input_with(source, copy(source))
    for update in chain.updates:
        for reader in [user for user in update.out.users if user not in owners and is_state_size(user, first, sizes)]:
            reader.replace_input_with(update.out, first[update.out])
