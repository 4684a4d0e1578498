"""Find rows of updates that run in one chain: the streams of models in which several read each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ir import Update

Row = list[Update]


def together(rows: Sequence[Row], index: GraphIndex, least: int) -> list[list[Row]]:
    """Return rows in groups: the streams of a chain each, unless that has to be cut.

    Two rows that the model runs in turns are in one group if one lies partly in an update of the other, if each reads
    the other, or if a long one reads the other. Rows that lie in an update as a whole are nested in it, and in groups
    among themselves.

    Args:
        rows: of updates.
        index: the graph.
        least: the least number of updates of a long row; a shorter one that only reads has no depth of its own.
    """
    import networkx as nx  # takes half a second

    overlaps = _overlaps(rows)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(rows)))
    for i, j in _in_turns(rows):
        readers = [a for a, b in ((i, j), (j, i)) if index.is_ancestor(rows[b][0].add.node, rows[a][-1].add.node)]
        is_read = len(readers) == 2 or any(len(rows[a]) >= least for a in readers)
        if overlaps.are_beside(i, j) and (is_read or overlaps.are_crossing(i, j)):
            graph.add_edge(i, j)
    return [[rows[i] for i in sorted(group)] for group in nx.connected_components(graph)]


def _in_turns(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of rows of which each begins before the other ends."""
    running: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: rows[i][0].add.node):
        running = [j for j in running if rows[i][0].add.node < rows[j][-1].add.node]
        yield from ((j, i) for j in running)
        running.append(i)


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

    def are_crossing(self, i: int, j: int) -> bool:
        """True if a part of one row, not all of it, is in the updates of the other."""
        return i in self.partly[j] or j in self.partly[i]


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
