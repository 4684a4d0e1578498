"""Cut steps in a row into rows that one call can run: where the next one needs what the call computes."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.analysis.sizes import is_state_size
from mfx_passes.ir import Cut, Step


def cut_chain(row: Iterable[Step], index: GraphIndex, mutations: Mutations) -> tuple[list[list[Step]], list[Cut]]:
    """Cut a row where a step needs what is only there after the row has run."""
    rows: list[OpenChain] = []
    cuts: list[Cut] = []
    for step in row:
        obstacle = rows[-1].obstacle(step) if rows else ""
        if obstacle is not None:
            cuts += [Cut(step.updates[0].add.node, done.steps[-1].updates[-1].add.node, obstacle) for done in rows[-1:]]
            rows.append(OpenChain(index, mutations))
        rows[-1].append(step)
    return [done.steps for done in rows], cuts


class OpenChain:
    """Steps that will be one call, and all that is computed from them, inside and outside of them."""

    def __init__(self, index: GraphIndex, mutations: Mutations) -> None:
        self.steps: list[Step] = []
        self._index = index
        self._mutations = mutations
        self._states: set[Node] = set()
        self._present: set[Node] = set()  # the states that the next step may read
        self._own: set[Node] = set()
        self._fed: set[Node] = set()  # outside; these run after the call, so they may move past other nodes
        self._read_by_fed: set[Node] = set()
        self._limit: Node | None = None  # an in-place operation that these must not move past

    def append(self, step: Step) -> None:
        """Add a step that the chain accepts."""
        self.steps.append(step)
        self._states.update(step.skips, step.outs)
        self._present.difference_update(step.skips)
        self._present.update(step.outs)
        self._own |= step.nodes

    def obstacle(self, step: Step) -> str | None:
        """Return why a step cannot be the next one; None if all it captures, or starts from, is there before the row.

        Sizes need not be: all states share theirs, and what an earlier branch computed of others is handed on.
        """
        self._look_beside(step)
        sizes, position = self._index.sizes, self._index.position
        for node in {*step.skips, *step.reads} - self._present:
            if (
                node.op == "get_attr"
                or is_state_size(node, self._states, sizes)
                or (node in self._own and node in sizes)
            ):
                continue
            if node in self._own or node in self._fed:
                return f"it needs {node.name}, which is there only after the chain has run"
            if self._limit is not None and position[node] > position[self._limit]:
                return f"it needs {node.name}, which comes after {self._limit.name} has changed a value in place"
        return None

    def _look_beside(self, step: Step) -> None:
        """Follow the uses of the row's values outside, up to the end of the next step."""
        first, last = min(self.steps[-1].nodes), max(step.nodes)
        for node in self._index.between(first, last):
            if node in self._own or node in step.nodes:
                continue
            if any(source in self._own or source in self._fed for source in node.all_input_nodes):
                self._fed.add(node)
                self._read_by_fed.update(node.all_input_nodes)
            for mutation in self._mutations.at([node]):
                if self._limit is None and (node in self._fed or mutation.family & self._read_by_fed):
                    self._limit = node
