"""Split rows of steps into rows that one call can run: without refused steps, and cut where the next does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.analysis.sizes import is_state_size
from mfx_passes.find.check import refused
from mfx_passes.ir import Grounds, Rejection, Step


def cut_chain(
    row: list[Step], index: GraphIndex, mutations: Mutations, known: Mapping[str, Grounds]
) -> tuple[list[list[Step]], list[Rejection]]:
    """Take refused steps out of a row, and cut it where a step needs what is only there after the row has run."""
    rows: list[OpenChain] = []
    rejections: list[Rejection] = []
    open_row: OpenChain | None = None
    for step in row:
        if grounds := known.get(step.add.node.name) or refused(step, index, mutations):
            rejections.append(Rejection(step.add.node, *grounds))
            open_row = None
            continue
        if open_row is None or not open_row.accepts(step):
            open_row = OpenChain(step.skip, index, mutations)
            rows.append(open_row)
        open_row.append(step)
    return [done.steps for done in rows], rejections


class OpenChain:
    """Steps that will be one call, and all that is computed from them, inside and outside of them."""

    def __init__(self, start: Node, index: GraphIndex, mutations: Mutations) -> None:
        self.steps: list[Step] = []
        self._index = index
        self._mutations = mutations
        self._states = {start}
        self._own: set[Node] = set()
        self._fed: set[Node] = set()  # outside; these run after the call, so they may move past other nodes
        self._read_by_fed: set[Node] = set()
        self._limit: Node | None = None  # an in-place operation that these must not move past

    def append(self, step: Step) -> None:
        """Add a step that the chain accepts."""
        self.steps.append(step)
        self._states.add(step.out)
        self._own |= step.nodes

    def accepts(self, step: Step) -> bool:
        """True if all that the step captures is there before the row begins.

        Sizes need not be: all states share theirs, and what an earlier branch computed of others is handed on.
        """
        if not self.steps:
            return True
        self._look_beside(step)
        sizes, position = self._index.sizes, self._index.position
        for node in step.inputs()[1:]:
            if is_state_size(node, self._states, sizes) or (node in self._own and node in sizes):
                continue
            if node in self._own or node in self._fed:
                return False
            if self._limit is not None and position[node] > position[self._limit]:
                return False
        return True

    def _look_beside(self, step: Step) -> None:
        """Follow the uses of the row's values outside, up to the end of the next step."""
        for node in self._index.between(self.steps[-1].skip, step.out):
            if node in self._own or node in step.nodes:
                continue
            if any(source in self._own or source in self._fed for source in node.all_input_nodes):
                self._fed.add(node)
                self._read_by_fed.update(node.all_input_nodes)
            for mutation in self._mutations.at([node]):
                if self._limit is None and (node in self._fed or mutation.family & self._read_by_fed):
                    self._limit = node
