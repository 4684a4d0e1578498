"""In-place operations, and the nodes whose memory they change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ops import vocabulary


@dataclass(frozen=True, eq=False)
class Mutation:
    """An in-place operation, and every node that may share the memory it changes."""

    node: Node
    operand: Node
    family: frozenset[Node]


class Mutations:
    """The in-place operations on the tensors of a graph.

    Args:
        index: the graph.
        sums: residual sums; each has memory of its own, because a rewritten one is out of place.
        forward_only: True if the graph is never differentiated, so that no operation is recomputed.
    """

    def __init__(self, index: GraphIndex, sums: Collection[Node] = (), *, forward_only: bool = False) -> None:
        self.forward_only = forward_only
        self._index = index
        self.sums = sums
        self._at: dict[Node, Mutation] = {}
        self._touching: defaultdict[Node, list[Mutation]] = defaultdict(list)
        for node in index.nodes:
            operand = index.mutated(node)
            if operand is not None and operand not in index.sizes:
                self._add(Mutation(node, operand, self._family(operand, node)))

    def _add(self, mutation: Mutation) -> None:
        self._at[mutation.node] = mutation
        for node in mutation.family:
            self._touching[node].append(mutation)

    def at(self, nodes: Iterable[Node]) -> list[Mutation]:
        """Return the in-place operations among some nodes."""
        return [self._at[node] for node in nodes if node in self._at]

    def touching(self, nodes: Iterable[Node]) -> list[Mutation]:
        """Return the in-place operations that may change the value of one of some nodes, in program order."""
        found = {mutation.node: mutation for node in nodes for mutation in self._touching.get(node, ())}
        return [found[node] for node in self._index.sorted(found)]

    def _family(self, operand: Node, mutator: Node) -> frozenset[Node]:
        root = operand
        while (source := self._shares_memory_with(root)) is not None:
            root = source
        family, todo = {root}, [root]
        while todo:
            for user in todo.pop().users:
                if user is not mutator and user not in family and self._shares_memory_with(user) in family:
                    family.add(user)
                    todo.append(user)
        return frozenset(family)

    def _shares_memory_with(self, node: Node) -> Node | None:
        """Return the operand whose memory the value of a node may lie in, None if it has its own."""
        if node in self.sums:
            return None
        if vocabulary.may_alias(node, self._index.modules):
            return vocabulary.preserved(node)
        return self._index.mutated(node) if vocabulary.returns_operand(node) else None
