"""In-place operations untangled: whoever reads a changed value afterwards reads it from the operation that changed it.

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


def normalize(index: GraphIndex) -> bool:
    """Redirect the later readers of values changed in place; the value of every node stays what it was.

    Returns:
        Whether the graph changed; the index is stale then.
    """
    redirected = [_redirect(node, index) for node in index.nodes]
    return any(redirected)


def _redirect(mutator: Node, index: GraphIndex) -> bool:
    # Its operand is asked for only now: an earlier in-place operation may have become it.
    operand = index.mutated(mutator)
    if operand is None or operand in index.sizes or not vocabulary.returns_operand(mutator):
        return False
    later = [user for user in operand.users if index.position[user] > index.position[mutator]]
    for user in later:
        user.replace_input_with(operand, mutator)
    return bool(later)
