"""Residual adds, steps and chains in a graph, and the same cut out as graphs of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Graph, Node

Kind = Literal["residual", "map"]


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a submodule that the tracer walked through.

    Args:
        target: the submodule's path.
        args: its arguments by position, with nodes in place of tensors.
        kwargs: its arguments by name.
        output: its result.
        nodes: all nodes recorded while it ran.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    nodes: frozenset[Node]


@dataclass(frozen=True, eq=False)
class ResidualAdd:
    """A sum, one term of which (the skip) is an ancestor of all the others (the branch).

    Args:
        node: the outermost node of the sum.
        sums: every node that belongs to the sum (more than one for ``x + attn + mlp``).
        skip_path: from the term itself upwards through value-preserving operations; the first entry is the term.
        bases: the part of ``skip_path`` of which all other terms are descendants; a step may begin at any of them.
        branch: the nodes that make up the other terms.
        is_scaled: True if the skip is a factor of its term, as in s*x + f(x) and g*x + (1 - g)*h(x).
    """

    node: Node
    sums: frozenset[Node]
    skip_path: tuple[Node, ...]
    bases: tuple[Node, ...]
    branch: tuple[Node, ...]
    is_scaled: bool = False


@dataclass(eq=False)
class Step:
    """One residual step: from the state ``skip`` to the state ``out``.

    Args:
        add: its residual add, as it was found.
        skip: the node that holds the state it starts from.
        term: the skip as the sum reads it, after value-preserving operations.
        out: the node that holds the state it ends in: the sum itself, or the end of its tail.
        nodes: all nodes it owns: branch, sum and tail, and those that are computed for it alone.
        kind: ``"residual"``: a branch f is added to the state; ``"map"``: a map h replaces it, and f = h(x) - x.
        path: longest common module path of its branch.
        name: its path, and its number among the steps of this path: ``blocks.0:2``.
    """

    add: ResidualAdd
    skip: Node
    term: Node
    out: Node
    nodes: set[Node]
    kind: Kind
    path: str
    name: str = ""

    @property
    def reads(self) -> list[Node]:
        """The nodes outside that its nodes read, in program order."""
        return sorted({source for node in self.nodes for source in node.all_input_nodes} - self.nodes)

    def inputs(self) -> list[Node]:
        """Return its state first, then its captures: what it reads from outside, without parameters and buffers."""
        return [self.skip, *(node for node in self.reads if node is not self.skip and node.op != "get_attr")]


@dataclass(eq=False)
class Chain:
    """Consecutive residual steps: the state one ends in is the state the next starts from.

    Args:
        steps: at least one, in the order they run.
        name: the longest common module path of the steps; with #2 and so on if that is another chain's name.
    """

    steps: list[Step]
    name: str = ""

    @property
    def start(self) -> Node:
        """The node that holds the state before the first step."""
        return self.steps[0].skip

    @property
    def states(self) -> list[Node]:
        """The nodes that hold the states after each step."""
        return [step.out for step in self.steps]

    @property
    def nodes(self) -> set[Node]:
        """All nodes that the steps own."""
        return set().union(*(step.nodes for step in self.steps))


@dataclass(frozen=True, eq=False)
class StepGraphs:
    """A step cut out of its model, as graphs that take ``(x, *captures)`` and return ``(value, *side_outputs)``.

    Args:
        path: longest common module path of its nodes; empty if it lies in the root.
        kind: ``"residual"`` for x + f(x), ``"map"`` for h(x).
        branch: f(x) for the kind ``"residual"``, h(x) for ``"map"``.
        original: the step as the user wrote it; the same graph as ``branch`` for the kind ``"map"``.
        captures: numbers of the chain's captures that it reads, in the order of its inputs; numbers past these are side
            outputs of earlier steps (sizes that one branch computed and a later one reads), counted from the first on.
        targets: dotted paths of the modules and tensors it reads, through inner chain calls, too.
        sides: names of its side outputs.
    """

    path: str
    kind: Kind
    branch: Graph
    original: Graph
    captures: tuple[int, ...]
    targets: tuple[str, ...]
    sides: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ChainGraphs:
    """A chain cut out of its model, as a momentum call runs it.

    Args:
        name: unique in its model.
        steps: the steps, first to last.
        taps: numbers t of the states x[t] that are read outside (0 < t < number of steps).
    """

    name: str
    steps: tuple[StepGraphs, ...]
    taps: tuple[int, ...]
