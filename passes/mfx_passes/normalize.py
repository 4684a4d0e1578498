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

import operator
from dataclasses import dataclass

from torch.fx import Node

from mfx_passes import vocabulary
from mfx_passes.index import GraphIndex


@dataclass(frozen=True, eq=False)
class Mutation:
    """An in-place operation, and every node that may share the memory it changes."""

    node: Node
    operand: Node
    family: frozenset[Node]


def mutations_in(index: GraphIndex) -> list[Mutation]:
    """All in-place operations on tensors."""
    found = []
    for node in index.nodes:
        operand = index.mutated(node)
        if operand is not None and operand not in index.sizes:
            found.append(Mutation(node, operand, _family(operand, node, index)))
    return found


def normalize(index: GraphIndex) -> bool:
    """Redirect the later readers of values changed in place; the value of every node stays what it was.

    Returns:
        Whether the graph changed; the index is stale then.
    """
    returning = [m for m in mutations_in(index) if m.node.target is not operator.setitem]
    return any([_redirect(mutation.operand, mutation.node, index) for mutation in returning])


def _redirect(operand: Node, mutator: Node, index: GraphIndex) -> bool:
    if not index.is_read_after(operand, mutator):
        return False
    for user in [user for user in operand.users if index.position[user] > index.position[mutator]]:
        user.replace_input_with(operand, mutator)
    return True


def _family(operand: Node, mutator: Node, index: GraphIndex) -> frozenset[Node]:
    root = operand
    while vocabulary.may_alias(root, index.modules):
        root = vocabulary.preserved(root)
    family, todo = {root}, [root]
    while todo:
        for user in todo.pop().users:
            aliases = user is not mutator and user not in family and vocabulary.may_alias(user, index.modules)
            if aliases and vocabulary.preserved(user) in family:
                family.add(user)
                todo.append(user)
    return frozenset(family)
