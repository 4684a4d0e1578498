"""In-place operations, and the nodes whose memory they change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch.fx import Node

from mfx_passes import paths
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ops import vocabulary
from mfx_passes.ops.writes import changes_buffers, written_beside


@dataclass(frozen=True, eq=False)
class Mutation:
    """An in-place operation, and every node that may share the memory it changes.

    Args:
        node: the operation.
        operand: what it changes.
        family: the nodes that may share memory with it.
        beside: True if the operation has another result than what it changes: statistics, for example.
    """

    node: Node
    operand: Node
    family: frozenset[Node]
    beside: bool = False

    @property
    def is_unseen(self) -> bool:
        """True if a later change of a tensor of the model cannot be told: kernels raise no version of statistics."""
        return self.beside and any(node.op == "get_attr" for node in self.family)


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
        self._at: defaultdict[Node, list[Mutation]] = defaultdict(list)
        self._touching: defaultdict[Node, list[Mutation]] = defaultdict(list)
        self._reads: defaultdict[str, list[Node]] = defaultdict(list)  # by path, and by the paths around it
        for node in index.nodes:
            if node.op == "get_attr":
                for path in paths.ancestors(str(node.target)):
                    self._reads[path].append(node)
        for node in index.nodes:
            operand = index.mutated(node)
            if operand is not None and operand not in index.sizes:
                self._add(Mutation(node, operand, self.family(operand, node)))
            for written in (*written_beside(node, index.modules), *self._buffers_of(node)):
                self._add(Mutation(node, written, self.family(written, node), beside=True))

    def _add(self, mutation: Mutation) -> None:
        self._at[mutation.node].append(mutation)
        for node in mutation.family:
            self._touching[node].append(mutation)

    def __bool__(self) -> bool:
        return bool(self._at)

    def at(self, nodes: Iterable[Node]) -> list[Mutation]:
        """Return the in-place operations among some nodes."""
        return [mutation for node in nodes if node in self._at for mutation in self._at[node]]

    def touching(self, nodes: Iterable[Node]) -> list[Mutation]:
        """Return the in-place operations that may change the value of one of some nodes, in program order."""
        found = {mutation for node in nodes for mutation in self._touching.get(node, ())}
        return sorted(found, key=lambda mutation: self._index.position[mutation.node])

    def may_change_again(self, node: Node) -> bool:
        """True if a value may lie in memory that was there before the call, and that each call changes."""
        changes = False
        while not changes or node.op not in ("placeholder", "get_attr"):
            changes = changes or node in self._at or bool(self._touching.get(node))
            if (source := self._shares_memory_with(node)) is None:
                break
            node = source
        return changes and node.op in ("placeholder", "get_attr")

    def family(self, node: Node, mutator: Node | None = None) -> frozenset[Node]:
        """Return the nodes that may share memory with one, but for those that do by an in-place operation on it."""
        root = node
        while (source := self._shares_memory_with(root)) is not None:
            root = source
        roots = self._reads[str(root.target)] if root.op == "get_attr" else [root]
        family, todo = set(roots), [*roots]
        while todo:
            for user in todo.pop().users:
                if user is not mutator and user not in family and self._shares_memory_with(user) in family:
                    family.add(user)
                    todo.append(user)
        return frozenset(family)

    def _buffers_of(self, node: Node) -> list[Node]:
        """Return the reads of buffers of a module that a node calls, and that may change them."""
        reads = self._reads.get(str(node.target), ()) if node.op == "call_module" else ()
        module = self._index.modules.get(str(node.target))
        if not reads or module is None or not changes_buffers(module):
            return []
        buffers = {paths.join(str(node.target), name) for name, _ in module.named_buffers()}
        return [read for read in reads if read.target in buffers]

    def _shares_memory_with(self, node: Node) -> Node | None:
        return None if node in self.sums else shares_memory_with(node, self._index.modules)


def shares_memory_with(node: Node, modules: vocabulary.Modules) -> Node | None:
    """Return the operand whose memory the value of a node may lie in, None if it has its own."""
    if node.op == "call_module" and (written := next(written_beside(node, modules), None)):
        return written
    if vocabulary.may_alias(node, modules):
        return vocabulary.preserved(node)
    return vocabulary.mutated_operand(node, modules) if vocabulary.returns_operand(node) else None
