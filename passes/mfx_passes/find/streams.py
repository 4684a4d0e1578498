"""Find rows of updates that run in one chain: the streams of models in which several read each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ir import Update

Row = list[Update]


def together(rows: Sequence[Row], index: GraphIndex, least: int) -> list[list[Row]]:
    """Return rows in groups: the streams of a chain each, unless that has to be cut.

    Two rows are in one group if each reads the other, if one reads the other and the model runs them in turns, or if
    one lies partly in an update of the other. Rows that lie in an update as a whole are nested in it, and in groups
    among themselves.

    Args:
        rows: of updates.
        index: the graph.
        least: the least number of updates of a row that only reads others; a shorter one has no depth of its own.
    """
    import networkx as nx  # takes half a second

    overlaps, reads = _overlaps(rows), _reads(rows, index)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(rows)))
    for i, others in enumerate(reads):
        is_long = len(rows[i]) >= least
        in_turns = {j for j in others if i in reads[j] or (is_long and rows[i][0].add.node < rows[j][-1].add.node)}
        graph.add_edges_from((i, j) for j in in_turns | overlaps.partly[i] if overlaps.are_beside(i, j))
    return [[rows[i] for i in sorted(group)] for group in nx.connected_components(graph)]


def _reads(rows: Sequence[Row], index: GraphIndex) -> list[set[int]]:
    """Return for each row the others whose first update its last one is computed from."""
    firsts = {index.bits([row[0].add.node]): i for i, row in enumerate(rows)}
    every, found = sum(firsts), []
    for i, row in enumerate(rows):
        left, read = index.ancestors(row[-1].add.node) & every, set()
        while left:
            lowest = left & -left
            read.add(firsts[lowest])
            left ^= lowest
        found.append(read - {i})
    return found


@dataclass
class _Overlaps:
    """The rows that own nodes of each other.

    Args:
        inside: for each row, those that have it in one of their updates.
        partly: for each row, those that have a part of it in one of their updates.
    """

    inside: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    partly: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def are_beside(self, i: int, j: int) -> bool:
        """True if none of two rows is inside of the other, and both are in the same updates."""
        return self.inside[i] == self.inside[j]  # a row is not inside of itself


def _overlaps(rows: Sequence[Row]) -> _Overlaps:
    owners: dict[Node, list[tuple[int, int]]] = defaultdict(list)
    for i, row in enumerate(rows):
        for t, update in enumerate(row):
            for node in update.nodes:
                owners[node].append((i, t))
    sizes = Counter(i for several in owners.values() for i in {i for i, _ in several})
    shared: Counter[tuple[tuple[int, int], int]] = Counter()
    for several in owners.values():
        if len(several) > 1:
            here = {i for i, _ in several}
            shared.update((owner, i) for owner in several for i in here if i != owner[0])
    found = _Overlaps()
    for ((outer, _), inner), count in shared.items():
        (found.inside if count == sizes[inner] else found.partly)[inner].add(outer)
    return found


def in_order(rows: Iterable[Row]) -> Row:
    """Return the updates of several rows in the order of their sums."""
    return sorted((update for row in rows for update in row), key=lambda update: update.add.node)
