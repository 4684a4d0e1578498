"""The nesting of chains in the branches of steps of other chains."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from mfx_passes.ir import Chain, Step


class Nesting:
    """A forest of chains and steps, with edges from a chain to its steps, and from a step to the chains in its branch.

    Args:
        chains: the chains, outermost first; none lies partly inside a step of another one.
    """

    def __init__(self, chains: Iterable[Chain] = ()) -> None:
        import networkx as nx  # takes half a second

        self.forest = nx.DiGraph()
        self._innermost: dict[Node, Step] = {}
        for chain in chains:
            inside = self.add(chain)
            assert inside

    def add(self, chain: Chain) -> bool:
        """Add a chain, after those around it; False, and not added, if it lies partly inside a step of another one."""
        (outer, *others) = {self._innermost.get(node) for node in chain.nodes}
        if others:
            return False
        self.forest.add_node(chain)
        if outer is not None:
            self.forest.add_edge(outer, chain)
        for step in chain.steps:
            self.forest.add_edge(chain, step)
            self._innermost.update(dict.fromkeys(step.nodes, step))
        return True

    @property
    def chains(self) -> list[Chain]:
        """The chains, outermost first."""
        return [member for member in self.forest if isinstance(member, Chain)]

    def innermost(self, node: Node) -> Step | None:
        """Return the innermost step that owns a node, None if it lies in no chain."""
        return self._innermost.get(node)

    def holders(self, node: Node) -> list[Step]:
        """Return the steps that own a node, innermost first."""
        step = self._innermost.get(node)
        return [] if step is None else [step, *self.around(step)]

    def around(self, inner: Chain | Step) -> list[Step]:
        """Return the steps in whose branches a chain or step lies, innermost first."""
        steps: list[Step] = []
        for outer in self.forest.predecessors(inner):  # one, or none
            steps = [*([outer] if isinstance(outer, Step) else []), *self.around(outer)]
        return steps
