"""Order the updates of several streams into steps that find every state that they read in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.find.streams import Row, in_order
from mfx_passes.find.updates import own
from mfx_passes.ir import Cut, Step, Update, outside
from mfx_passes.ops import vocabulary

if TYPE_CHECKING:
    import networkx as nx


def schedule(rows: Sequence[Row], index: GraphIndex) -> tuple[list[list[Step]], list[Cut]]:
    """Return the updates of rows as steps, in as few lists as possible; the steps of a list can be one chain.

    An update comes after the one that gives a state that it reads, and not after the one that replaces the state.
    Updates that share a node are one step. So are those whose random numbers the model draws in turns, for a chain
    draws them in the same order. Where that leaves no order, the list ends, and what the last update reads is there
    before the next chain.
    """
    if len(rows) == 1:
        return [[Step.of([update]) for update in rows[0]]], []
    lists: list[list[Step]] = []
    cuts: list[Cut] = []
    updates = in_order(rows)
    while updates:
        count, why = len(updates), ""
        while isinstance(found := _steps(updates[:count], index), _Misfit):
            count, why = found.number, found.why
        if why:
            cuts.append(Cut(updates[count].add.node, updates[count - 1].add.node, why))
        lists.append(found)
        updates = updates[count:]
    return lists, cuts


class _Misfit(NamedTuple):
    """The number of the first update for which there is no order with those before it, and the reason."""

    number: int
    why: str


def _steps(updates: Sequence[Update], index: GraphIndex) -> list[Step] | _Misfit:
    """Return the steps in order, or the first update that does not fit."""
    import networkx as nx  # takes half a second

    order = _Order(updates, index)
    steps = nx.condensation(order.graph)
    members = nx.get_node_attributes(steps, "members")
    where = steps.graph["mapping"]
    wrong: list[tuple[int, int, int]] = [
        (max(members[where[a]]), a, b) for a, b in order.strict if where[a] == where[b]
    ]
    if wrong:
        number, a, b = min(wrong)
        return _Misfit(number, order.contradiction(a, b))
    first: dict[int, int] = {step: min(members[step]) for step in steps}
    order_of_steps: Iterator[int] = nx.lexicographical_topological_sort(steps, key=first.__getitem__)
    return [Step.of([updates[i] for i in sorted(members[step])]) for step in order_of_steps]


class _Order:
    """The order of updates, by number: those that come before each.

    Attributes:
        graph: an edge if one comes before another or in the same step, with the reason as ``why``.
        strict: pairs of which the first comes before the second.
    """

    def __init__(self, updates: Sequence[Update], index: GraphIndex) -> None:
        import networkx as nx

        self._updates, self._index = updates, index
        self._states = {node for update in updates for node in (update.skip, update.out)}
        self._writer = {update.out: i for i, update in enumerate(updates)}
        self._replacer = {update.skip: i for i, update in enumerate(updates)}
        self.strict: list[tuple[int, int]] = []
        self.graph: nx.DiGraph = nx.DiGraph()
        self.graph.add_nodes_from(range(len(updates)))
        self._own()
        for i, update in enumerate(updates):
            for state in {update.skip, *outside(update.nodes)} & self._states:
                self._read(i, state)
        self._share()

    def _own(self) -> None:
        """Give each update what it owns: it ends at the states of all streams."""
        index = self._index
        starts = [update for update in self._updates if update.skip not in self._writer]
        later = index.bits(self._writer)
        for update in self._updates:
            known = index.ancestors(update.out)
            present = [start.skip for start in starts if not known & index.bits([start.out]) or start is update]
            own(update, index, self._states, later | index.bits(present))

    def _read(self, i: int, state: Node) -> None:
        writer, replacer = self._writer.get(state), self._replacer.get(state)
        if writer is not None:
            self.strict.append((writer, i))
            self._add(writer, i, "{1} reads what {0} gives")
        elif replacer is not None and self._index.is_ancestor(self._updates[replacer].out, self._updates[i].skip):
            return  # a first state, which is there before the chain
        if replacer is not None and replacer != i:
            self._add(i, replacer, f"{{0}} reads {state}, which is gone after {{1}}")

    def _share(self) -> None:
        """Relate updates that own the same node, or nodes that draw random numbers."""
        owners: dict[Node, list[int]] = defaultdict(list)
        for i, update in enumerate(self._updates):
            for node in update.nodes:
                owners[node].append(i)
        for node, several in owners.items():
            for a, b in pairwise([*several, several[0]] if len(several) > 1 else ()):
                self._add(a, b, f"{{0}} and {{1}} share {node}")
        drawing = [owners[node][0] for node in sorted(owners) if vocabulary.may_draw(node, self._index.modules)]
        for a, b in pairwise(drawing):
            if a != b:
                self._add(a, b, "{0} draws random numbers before {1} does")

    def _add(self, a: int, b: int, why: str) -> None:
        if not self.graph.has_edge(a, b):
            self.graph.add_edge(a, b, why=why.format(self._updates[a].add.node, self._updates[b].add.node))

    def contradiction(self, a: int, b: int) -> str:
        """Return why one update that comes before another must also come after it or run with it."""
        import networkx as nx

        way = nx.shortest_path(self.graph, b, a)
        return ", but ".join(self.graph.edges[edge]["why"] for edge in [(a, b), *pairwise(way)])
