"""Make steps of rows of updates: bring together streams that read each other, order them, check, cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.find.check import refused
from mfx_passes.find.cut import cut_chain
from mfx_passes.find.scaled import without_scaled
from mfx_passes.find.schedule import schedule
from mfx_passes.find.streams import Row, in_order, together
from mfx_passes.find.updates import own
from mfx_passes.ir import Cut, Grounds, Rejection, Selection, Step, Update


@dataclass
class Found:
    """Lists of steps that can be a chain each, the updates left out, and where chains were cut."""

    lists: list[list[Step]] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)

    def __iadd__(self, other: Found) -> Found:
        self.lists += other.lists
        self.rejections += other.rejections
        self.cuts += other.cuts
        return self


def find_steps(
    rows: Sequence[Row],
    index: GraphIndex,
    mutations: Mutations,
    selection: Selection,
    grounds: Mapping[str, Grounds],
) -> Found:
    """Return the lists of steps that can be made of rows.

    Args:
        rows: of updates of one stream each.
        index: the graph.
        mutations: its in-place operations.
        selection: which residual adds may be rewritten.
        grounds: why some of them are not, by name of the sum.
    """
    finder = _Finder(index, mutations, selection, grounds)
    finder.find(rows)
    return finder.found


class _Finder:
    """Makes lists of steps of rows of updates; rows that read each other are streams of one list."""

    def __init__(
        self, index: GraphIndex, mutations: Mutations, selection: Selection, grounds: Mapping[str, Grounds]
    ) -> None:
        self._index, self._mutations, self._selection, self._known = index, mutations, selection, grounds
        self.found = Found()

    def find(self, rows: Sequence[Row]) -> None:
        """Find the steps of rows; a short one is in no other's list, unless it is a piece of a long one."""
        least = self._selection.min_steps
        self._find_streams([row for row in rows if len(row) >= least])
        for row in rows:
            if len(row) < least:
                self._find_steps([row])

    def _find_streams(self, rows: Sequence[Row]) -> None:
        for group in together(rows, self._index, self._selection.min_steps):
            self._find_steps(group)

    def _find_steps(self, rows: Sequence[Row]) -> None:
        lists, cuts = schedule(rows, self._index)
        if grounds := self._refused(rows):
            self.found.rejections += [Rejection(update.add.node, *why) for update, why in grounds.items()]
            pieces = [list(piece) for row in rows for is_out, piece in groupby(row, grounds.__contains__) if not is_out]
            self._find_streams(pieces)
            return
        found = self._cut(lists, cuts)
        if len(rows) > 1 and self._length(found.lists) < max(map(len, rows)):  # apart, the longest row is a chain
            for update in in_order(rows):
                own(update, self._index)
            found = self._cut(_alone(rows), ())
        self.found += found

    def _length(self, lists: Iterable[list[Step]]) -> int:
        """Return the number of updates in lists of steps that are long enough for a chain."""
        return sum(len(step.updates) for steps in lists if len(steps) >= self._selection.min_steps for step in steps)

    def _refused(self, rows: Iterable[Row]) -> dict[Update, Grounds]:
        grounds: dict[Update, Grounds] = {}
        for update in in_order(rows):
            if why := self._known.get(update.add.node.name) or refused(update, self._index, self._mutations):
                grounds[update] = why
        return grounds

    def _cut(self, lists: Iterable[list[Step]], cuts: Iterable[Cut]) -> Found:
        found = Found(cuts=list(cuts))
        for steps in lists:
            parts, more = cut_chain(steps, self._index, self._mutations)
            found.cuts += more
            for part in parts:
                found += Found(*without_scaled(part, self._index, self._selection))
        return found


def _alone(rows: Iterable[Row]) -> list[list[Step]]:
    """Return rows as steps of one update each."""
    return [[Step.of([update]) for update in row] for row in rows]
