"""What the passes hand to each other: residual adds, steps, chains, rejections, findings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import Graph, Node


def inputs_of(step: Step) -> list[Node]:
    """What a step reads from outside: its state first, then its captures (parameters and buffers are no captures)."""
    captures = [node for node in _reads(step) if node is not step.skip and node.op != "get_attr"]
    return [step.skip, *captures]


def _reads(step: Step) -> list[Node]:
    # In program order: sets of nodes are in no order, and graphs must come out the same every time.
    return sorted({source for node in step.nodes for source in node.all_input_nodes} - step.nodes)


Kind = Literal["residual", "map"]


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a submodule that the tracer walked through.

    Args:
        target: the submodule's path.
        args: what it was given by position, with nodes in place of tensors.
        kwargs: what it was given by name.
        output: what it returned.
        nodes: all nodes recorded while it ran.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    nodes: frozenset[Node]


@dataclass(frozen=True, eq=False)
class Rejection:
    """A residual add that stays as it was.

    Args:
        node: the node of the sum, in the graph as captured.
        reason: why, and where it helps, what could be done about it.
    """

    node: Node
    reason: str

    @property
    def path(self) -> str:
        """Module whose forward holds the sum, ``""`` for the root."""
        return enclosing_path(self.node)

    @property
    def source(self) -> str:
        """``file:line`` of the sum in the user's code, ``""`` if it was not recorded."""
        return source_line(self.node)

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.path and f"in {self.path}", self.source)))
        return f"{self.node.name}{f' ({where})' if where else ''}: {self.reason}"


@dataclass(frozen=True, eq=False)
class ResidualAdd:
    """A sum, one term of which (the skip) is an ancestor of all the others (the branch).

    Args:
        node: the outermost node of the sum.
        sums: every node that belongs to the sum (more than one for ``x + attn + mlp``).
        skip_path: from the term itself upwards through value-preserving operations; the first entry is the term.
        bases: the part of ``skip_path`` of which all other terms are descendants; a step may begin at any of them.
        branch: the nodes that make up the other terms.
    """

    node: Node
    sums: frozenset[Node]
    skip_path: tuple[Node, ...]
    bases: tuple[Node, ...]
    branch: tuple[Node, ...]


@dataclass(eq=False)
class Step:
    """One residual step: from the state ``skip`` to the state ``out``.

    Args:
        add: its residual add, as it was found.
        skip: the node that holds the state it starts from.
        term: the skip as the sum reads it, after value-preserving operations.
        out: the node that holds the state it ends in: the sum itself, or the end of its tail.
        nodes: everything it owns: branch, sum and tail, and what is computed for it alone.
        kind: ``"residual"``: a branch f is added to the state; ``"map"``: a map h replaces it, and f = h(x) - x.
        path: longest common module path of its branch.
    """

    add: ResidualAdd
    skip: Node
    term: Node
    out: Node
    nodes: set[Node]
    kind: Kind
    path: str


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
        """Everything the steps own."""
        return set().union(*(step.nodes for step in self.steps))


@dataclass(frozen=True)
class Findings:
    """Chains, outermost first, and the residual adds that are in none.

    Args:
        chains: those that were found; a chain inside of another's branch comes after it.
        rejections: residual adds that stay as they were, and why.
        reread: from states to the nodes that are read in their place since `relayout`; the values are the same.
    """

    chains: list[Chain] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    reread: dict[Node, Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """Which residual adds may be rewritten at all.

    Args:
        min_steps: shorter chains stay as they are.
        only: chain names or module paths (shell patterns); None allows all.
        skip: chain names or module paths (shell patterns) to leave alone.
        refused: names of sums known not to fit, and why.
        within: module path of the part of a model that the graph is of; chains and steps are named as in the model.
        forward_only: the graph is never differentiated, so no branch runs again.
        marked: only the steps that `whole_steps.mark_steps` marked; all other residual adds stay as they are.
    """

    min_steps: int = 2
    only: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    within: str = ""
    marked: bool = False
    forward_only: bool = False


@dataclass(frozen=True, eq=False)
class StepGraphs:
    """A step cut out of its model, as graphs that take ``(x, *captures)`` and return ``(value, *side_outputs)``.

    Args:
        path: longest common module path of its nodes; empty if it lies in the root.
        kind: ``"residual"`` for x + f(x), ``"map"`` for h(x).
        branch: f(x) for the kind ``"residual"``, h(x) for ``"map"``.
        original: the step as the user wrote it; the same graph as ``branch`` for the kind ``"map"``.
        captures: which of the chain's captures it reads, in the order of its inputs; numbers past these are side
            outputs of earlier steps (sizes that one branch computed and a later one reads), counted from the first on.
        targets: dotted paths of the modules and tensors it reads.
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
    """A chain cut out of its model: what a momentum call needs to run it.

    Args:
        name: unique in its model.
        steps: the steps, first to last.
        taps: numbers t of the states x[t] that somebody outside reads (0 < t < number of steps).
    """

    name: str
    steps: tuple[StepGraphs, ...]
    taps: tuple[int, ...]


_MARK = "momentum_chain"


def tag_momentum_call(node: Node, chain: str) -> None:
    """Note on a node that it runs a chain; the note stays with the node through other people's passes."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _MARK: chain}


def is_momentum_call(node: Node) -> bool:
    """Whether a node runs a chain that was rewritten before."""
    return node.op == "call_module" and _MARK in (node.meta.get("custom") or {})


_INDEX = re.compile(r"@\d+$")


def enclosing_path(node: Node) -> str:
    """Path of the innermost module whose forward made the node; a called module counts as its own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.target) if node.op in ("call_module", "get_attr") else ""
    return _INDEX.sub("", str(next(reversed(stack.values()))[0]))


def source_line(node: Node) -> str:
    """``file:line`` of the innermost recorded frame, ``""`` if none was recorded."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""
