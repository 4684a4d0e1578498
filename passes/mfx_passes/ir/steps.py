"""Residual adds, steps and chains in a graph, and the same cut out as graphs of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Graph, Node

from mfx_passes import paths

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
class Update:
    """One residual update of a stream: from the state ``skip`` to the state ``out``.

    Args:
        add: its residual add, as it was found.
        skip: the node that holds the state it starts from.
        term: the skip as the sum reads it, after value-preserving operations.
        tail: the operations on the sum, in order, that belong to the update.
        out: the node that holds the state it ends in: the sum itself, or the end of its tail.
        nodes: all nodes it owns: branch, sum and tail, and those that are computed for it alone.
        kind: ``"residual"``: a branch f is added to the state; ``"map"``: a map h replaces it, and f = h(x) - x.
        path: longest common module path of its branch.
        name: its path, and its number among the updates of this path: ``blocks.0:2``.
        stream: the number of its stream in the chain.
    """

    add: ResidualAdd
    skip: Node
    term: Node
    tail: tuple[Node, ...]
    out: Node
    nodes: set[Node]
    kind: Kind
    path: str = ""
    name: str = ""
    stream: int = 0

    @property
    def reads(self) -> list[Node]:
        """The nodes outside that its nodes read, in program order."""
        return outside(self.nodes)


@dataclass(eq=False)
class Step:
    """Updates that run together: all branches read the states from before, then every stream moves on.

    Args:
        updates: one for each of some streams of a chain, in the order of the streams.
        nodes: all nodes they own; a node that several of them need is there once.
    """

    updates: tuple[Update, ...]
    nodes: set[Node]

    @classmethod
    def of(cls, updates: Iterable[Update]) -> Step:
        """Return the step of some updates."""
        updates = tuple(updates)
        return cls(updates, set().union(*(update.nodes for update in updates)))

    @property
    def path(self) -> str:
        """The longest common module path of its updates."""
        return paths.common(update.path for update in self.updates)

    @property
    def skips(self) -> list[Node]:
        """The nodes that hold the states it starts from."""
        return [update.skip for update in self.updates]

    @property
    def outs(self) -> list[Node]:
        """The nodes that hold the states it ends in."""
        return [update.out for update in self.updates]

    @property
    def sums(self) -> set[Node]:
        """The nodes of its residual sums."""
        return set().union(*(update.add.sums for update in self.updates))

    @property
    def reads(self) -> list[Node]:
        """The nodes outside that its nodes read, in program order."""
        return outside(self.nodes)


def outside(nodes: Collection[Node]) -> list[Node]:
    """Return the nodes that some nodes read and that are not among them, in program order."""
    return sorted({source for node in nodes for source in node.all_input_nodes}.difference(nodes))


@dataclass(frozen=True)
class Container:
    """A module whose call is a run of whole steps: ``first`` and the steps after it, up to ``stop``.

    Args:
        path: the module's path.
        first: the number of the first step.
        stop: the number of the step behind the last one.
    """

    path: str
    first: int
    stop: int


@dataclass(eq=False)
class Chain:
    """Consecutive residual steps of one or several streams.

    The state in which one update of a stream ends is the state from which the next starts. A step may read the present
    states of all streams.

    Args:
        steps: at least one, in the order they run.
        name: the longest common module path of the steps; with #2 and so on if that is another chain's name.
        containers: the modules that its steps make up, those around others first.

    Attributes:
        streams: names of the streams: ``x`` for one alone, else those of their first states in the model.
    """

    steps: list[Step]
    name: str = ""
    containers: tuple[Container, ...] = ()

    def __post_init__(self) -> None:
        numbers: dict[Node, int] = {}  # streams by their present states
        for update in self.updates:
            update.stream = numbers[update.out] = numbers.pop(update.skip, len(numbers))
        starts = self.starts
        self.streams: tuple[str, ...] = ("x",) if len(starts) == 1 else tuple(node.name for node in starts)

    @property
    def updates(self) -> list[Update]:
        """The updates of all steps."""
        return [update for step in self.steps for update in step.updates]

    @property
    def starts(self) -> list[Node]:
        """The nodes that hold the streams' first states."""
        starts: dict[int, Node] = {}
        for update in self.updates:
            starts.setdefault(update.stream, update.skip)
        return [starts[stream] for stream in sorted(starts)]

    @property
    def ends(self) -> list[Node]:
        """The nodes that hold the streams' last states."""
        ends = {update.stream: update.out for update in self.updates}
        return [ends[stream] for stream in sorted(ends)]

    @property
    def states(self) -> list[list[Node]]:
        """The nodes that hold the present states of all streams, before the first step and after each."""
        states = [self.starts]
        for step in self.steps:
            states.append(list(states[-1]))
            for update in step.updates:
                states[-1][update.stream] = update.out
        return states

    @property
    def nodes(self) -> set[Node]:
        """All nodes that the steps own."""
        return set().union(*(step.nodes for step in self.steps))


@dataclass(frozen=True, eq=False)
class StepGraphs:
    """A step cut out of its model, as graphs of its own.

    They take ``(*states, *captures)`` and return ``(*values, *side_outputs)``, one value for each stream that it
    updates.

    Args:
        path: longest common module path of its nodes; empty if it lies in the root.
        kinds: for each value, ``"residual"`` for x + f(x), ``"map"`` for h(x).
        branch: values f(x) for the kind ``"residual"``, h(x) for ``"map"``.
        original: the step as the user wrote it; the same graph as ``branch`` if all its kinds are ``"map"``.
        captures: numbers of the chain's captures that it reads, in the order of its inputs; numbers past these are side
            outputs of earlier steps (sizes that one branch computed and a later one reads), counted from the first on.
        targets: dotted paths of the modules and tensors it reads, through inner chain calls, too.
        sides: names of its side outputs.
        reads: numbers of the streams whose states it takes.
        writes: numbers of the streams that it updates.
        paths: for each value, the longest common module path of its branch; empty if there is but one.
    """

    path: str
    kinds: tuple[Kind, ...]
    branch: Graph
    original: Graph
    captures: tuple[int, ...]
    targets: tuple[str, ...]
    sides: tuple[str, ...]
    reads: tuple[int, ...] = (0,)
    writes: tuple[int, ...] = (0,)
    paths: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kinds of its values."""
        return "+".join(sorted(set(self.kinds)))


@dataclass(frozen=True, eq=False)
class ChainGraphs:
    """A chain cut out of its model, as a momentum call runs it.

    Args:
        name: unique in its model.
        steps: the steps, first to last.
        taps: pairs (t, stream) for each state that is read outside after t steps, though its stream moves on later.
        streams: names of the streams, as the model's code has their first states.
        containers: the modules that the steps make up, those around others first.
    """

    name: str
    steps: tuple[StepGraphs, ...]
    taps: tuple[tuple[int, int], ...]
    streams: tuple[str, ...] = ("x",)
    containers: tuple[Container, ...] = ()

    @property
    def updates(self) -> tuple[int, ...]:
        """The number of updates of each stream."""
        counts = Counter(stream for step in self.steps for stream in step.writes)
        return tuple(counts[stream] for stream in range(len(self.streams)))
