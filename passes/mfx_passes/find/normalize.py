"""Untangle in-place operations: later readers of a changed value read it from the operation that changed it.

Before::

    relu = self.relu(x)          # ReLU(inplace=True): from here on x is relu(x)
    conv = self.conv(relu)
    add = conv + x

After::

    relu = self.relu(x)
    conv = self.conv(relu)
    add = conv + relu            # the skip is what it always was: relu(x)
"""

from __future__ import annotations

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ops import vocabulary


def is_tangled(index: GraphIndex) -> bool:
    """True if a value that is changed in place is read from an older node afterwards."""
    return any(_late_reads(node, index) for node in index.nodes)


def normalize(index: GraphIndex) -> None:
    """Redirect the later readers of values changed in place; the value of every node stays what it was.

    The graph is changed in place, and the index is stale then, if the graph was tangled.
    """
    for node in index.nodes:
        # Its operand is looked up only now: an earlier in-place operation may have become it.
        for reader, operand in _late_reads(node, index):
            reader.replace_input_with(operand, node)


def _late_reads(mutator: Node, index: GraphIndex) -> list[tuple[Node, Node]]:
    """Return the nodes that read the operand of an in-place operation after the operation, each with the operand."""
    operand = index.mutated(mutator)
    if operand is None or operand in index.sizes or not vocabulary.returns_operand(mutator):
        return []
    return [(user, operand) for user in operand.users if index.position[user] > index.position[mutator]]
