"""An index of a graph: positions, sizes and ancestry of its nodes, computed in one walk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import nn
from torch.fx import Graph, Node

from mfx_passes.ops import vocabulary
from mfx_passes.ops.sums import terms


class GraphIndex:
    """Positions, sizes, in-place changes and ancestry of the nodes of one graph, as it stands.

    Args:
        graph: the graph; the index does not follow later changes of it.
        modules: the modules its ``call_module`` nodes call, by dotted path.
    """

    def __init__(self, graph: Graph, modules: Mapping[str, nn.Module]) -> None:
        self.graph = graph
        self.modules = modules
        self.nodes = list(graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.sizes = self._sizes()
        self._bit, self._ancestors = self._ancestry()

    def _sizes(self) -> set[Node]:
        sizes: set[Node] = set()
        for node in self.nodes:
            if vocabulary.is_size(node, sizes):
                sizes.add(node)
        return sizes

    def _ancestry(self) -> tuple[dict[Node, int], dict[Node, int]]:
        """Return ancestor sets as integers, one bit for every node that may matter.

        Linear, but for the width of the integers. Nodes that matter have several readers, or are sums, or read by one.
        """
        watched: dict[Node, int] = {}
        ancestors: dict[Node, int] = {}
        for node in self.nodes:
            bits = 0
            for source in node.all_input_nodes:
                if source not in self.sizes:  # what is computed from a tensor's shape is not computed from its values
                    bits |= ancestors[source]
            matters = len(node.users) > 1 or terms(node) or any(terms(user) for user in node.users)
            if node not in self.sizes and matters:
                watched[node] = len(watched)
                bits |= 1 << watched[node]
            ancestors[node] = bits
        return watched, ancestors

    def is_ancestor(self, node: Node, descendant: Node) -> bool:
        """True if ``descendant`` is computed from ``node``, or is ``node`` itself; see `_ancestry` for which nodes."""
        bit = self._bit.get(node)
        return bit is not None and bool(self._ancestors[descendant] >> bit & 1)

    def bits(self, nodes: Iterable[Node]) -> int:
        """Return a set of nodes as `ancestors` does, without those that do not matter."""
        return sum({1 << self._bit[node] for node in nodes if node in self._bit})

    def ancestors(self, node: Node) -> int:
        """Return the nodes that a node is computed from, with the node itself, as bits; see `_ancestry` for which."""
        return self._ancestors[node]

    def share_computed_ancestor(self, a: Node, b: Node) -> bool:
        """True if both nodes are computed from one value that is itself computed (not an input of the graph)."""
        return bool(self._ancestors[a] & self._ancestors[b] & self._computed)

    @cached_property
    def _computed(self) -> int:
        return sum(1 << bit for node, bit in self._bit.items() if node.op not in ("placeholder", "get_attr"))

    def skip_path(self, node: Node) -> tuple[Node, ...]:
        """Return the nodes from ``node`` upwards through value-preserving operations to the value they preserve."""
        path = [node]
        while vocabulary.layout(path[-1], self.modules) is not None:
            path.append(vocabulary.preserved(path[-1]))
        return tuple(path)

    def layout(self, node: Node) -> tuple[object, ...] | None:
        """Return `vocabulary.layout` of a node."""
        return vocabulary.layout(node, self.modules)

    def mutated(self, node: Node) -> Node | None:
        """Return `vocabulary.mutated_operand` of a node."""
        return vocabulary.mutated_operand(node, self.modules)

    def only_reader(self, node: Node) -> Node | None:
        """Return the only node that reads a value, None if there are several; readers of its size do not count."""
        readers = [user for user in node.users if user not in self.sizes]
        return readers[0] if len(readers) == 1 else None

    def is_read_after(self, node: Node, moment: Node) -> bool:
        """True if a node is read after another one has run."""
        return any(self.position[user] > self.position[moment] for user in node.users)

    def between(self, first: Node, last: Node) -> list[Node]:
        """Return the nodes after ``first`` up to and including ``last``, in order."""
        return self.nodes[self.position[first] + 1 : self.position[last] + 1]

    def sorted(self, nodes: Iterable[Node]) -> list[Node]:
        """Return nodes in program order."""
        return sorted(nodes, key=self.position.__getitem__)
