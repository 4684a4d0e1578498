"""Cuts of what lies between the chains into pieces that are recomputed one by one: a pure function of its costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mfx.engine.memory.plan import ChainCost, StepCost

_POSITIONS = 64  # possible cuts considered in one segment
_HEIGHTS = 32  # sizes of the largest piece considered


@dataclass(frozen=True)
class NodeCost:
    """The measured cost of one node of a graph.

    Attributes:
        saved: the memory that autograd saves in it: sizes in bytes by a key that is unique in the segment.
        reads: names of the values that it reads.
        flops: of the forward pass.
        changes: keys of the memory that it changes in place.
    """

    saved: dict[int, int]
    reads: tuple[str, ...]
    flops: int
    changes: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SegmentCost:
    """The measured costs of a segment: the nodes between two chains, in order.

    Attributes:
        nodes: the cost of each node.
        values: the memory of each node's value, and of the segment's inputs, by name.
        names: of the nodes.
        read_after: names of the values that are read after the segment.
    """

    nodes: tuple[NodeCost, ...]
    values: dict[str, dict[int, int]]
    names: tuple[str, ...]
    read_after: frozenset[str]

    def positions(self) -> list[int]:
        """Return possible cuts: where few bytes cross, and no value from before is changed in place later."""
        allowed = [p for p in range(1, len(self.nodes)) if p not in self._torn()]
        live = {p: self.live(p) for p in (0, *allowed, len(self.nodes))}
        order = list(live)
        narrow = [
            p
            for before, p, after in zip(order, order[1:], order[2:], strict=False)
            if (live[p] <= live[before] or before == 0) and (live[p] <= live[after] or after == len(self.nodes))
        ]
        return sorted(sorted(narrow, key=live.__getitem__)[:_POSITIONS])

    def _torn(self) -> set[int]:
        made: dict[int, int] = {}
        torn: set[int] = set()
        for i, (name, node) in enumerate(zip(self.names, self.nodes, strict=True)):
            for key in node.changes:
                torn.update(range(made.get(key, 0) + 1, i + 1))
            for key in self.values.get(name, ()):
                made.setdefault(key, i)
        return torn

    def live(self, position: int) -> int:
        """Return the bytes of the values from before a position, without inputs, that nodes behind it read."""
        made = set(self.names[:position])
        read = {name for node in self.nodes[position:] for name in node.reads if name in made}
        return sum(self._memory(read).values())

    def saved(self, first: int, end: int) -> int:
        """Return the bytes that autograd saves in the nodes from ``first`` to ``end``."""
        return sum(self._saved(first, end).values())

    def cost(self, cuts: Sequence[int]) -> ChainCost:
        """Return the costs of the pieces, as steps that keep their inputs."""
        edges = [0, *cuts, len(self.nodes)]
        return ChainCost(tuple(self._piece(*edge) for edge in pairwise(edges)), None)

    def _piece(self, first: int, end: int) -> StepCost:
        made = set(self.names[first:end])
        later = {name for node in self.nodes[end:] for name in node.reads} | self.read_after
        inputs = self._memory({name for node in self.nodes[first:end] for name in node.reads} - made)
        shared = {*inputs, *self._memory(made & later)}
        saved = sum(size for key, size in self._saved(first, end).items() if key not in shared)
        flops = sum(node.flops for node in self.nodes[first:end])
        return StepCost(saved, 0, sum(inputs.values()), 0, flops)

    def _memory(self, names: Iterable[str]) -> dict[int, int]:
        return {key: size for name in names for key, size in self.values.get(name, {}).items()}

    def _saved(self, first: int, end: int) -> dict[int, int]:
        return {key: size for node in self.nodes[first:end] for key, size in node.saved.items()}


def choose_cuts(segments: Sequence[SegmentCost], at_once: int) -> list[tuple[int, ...]]:
    """Return the cuts with the fewest bytes: those that all pieces keep plus those of the largest one, recomputed.

    Args:
        segments: the costs of what lies between the chains.
        at_once: bytes that a step of a chain holds while it is recomputed: a piece may hold as much at no cost.
    """
    # Why not √n equal pieces: ResNet-152 (batch 2, 224 px, budget 0) would peak at 104.1 MiB instead of 93.4, with
    # arithmetic="float" at 61.7 instead of 51.0; uncut at 91.9 and 54.1.
    tables = [_Table(segment) for segment in segments]
    largest = max((table.largest_unit for table in tables), default=0)
    heights = sorted({h for table in tables for h in table.heights() if h >= largest} | {largest})
    heights = heights[:: max(1, len(heights) // _HEIGHTS)] + heights[-1:]
    best: tuple[float, list[tuple[int, ...]]] | None = None
    for height in heights:
        found = [table.cuts_within(height) for table in tables]
        total = max(height, at_once) + sum(kept for kept, _ in found)
        if best is None or total < best[0]:
            best = total, [cuts for _, cuts in found]
    assert best is not None
    return best[1]


class _Table:
    """The bytes that pieces between the possible cuts of one segment hold, and those that the cuts keep."""

    def __init__(self, segment: SegmentCost) -> None:
        self._edges = [0, *segment.positions(), len(segment.nodes)]
        self._kept = [0, *(segment.live(p) for p in self._edges[1:-1])]
        units = pairwise(self._edges)
        self._sizes = [segment.saved(*unit) for unit in units]

    @property
    def largest_unit(self) -> int:
        return max(self._sizes)

    def heights(self) -> Iterator[int]:
        """Yield the bytes of every possible piece."""
        for first in range(len(self._sizes)):
            total = 0
            for size in self._sizes[first:]:
                total += size
                yield total

    def cuts_within(self, height: int) -> tuple[int, tuple[int, ...]]:
        """Return the fewest bytes that cuts keep with no piece above a height, and these cuts."""
        best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        for end in range(1, len(self._sizes) + 1):
            choices, total = [], 0
            for first in range(end - 1, -1, -1):
                total += self._sizes[first]
                if total > height and first < end - 1:
                    break
                kept, cuts = best[first]
                choices.append((kept + self._kept[first], (*cuts, self._edges[first]) if first else cuts))
            best.append(min(choices, key=lambda choice: (choice[0], len(choice[1]))))
        return best[-1]
