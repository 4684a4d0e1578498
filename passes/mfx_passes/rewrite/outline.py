"""Cuts the steps of a chain out of their graph: each becomes a small graph with explicit inputs."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch.fx import Graph, Node

from mfx_passes.ir import Chain, ChainGraphs, Step, StepGraphs
from mfx_passes.ops import sums
from mfx_passes.rewrite.extract import Lookup, extract

Reached = Mapping[str, tuple[str, ...]]  # what the steps of rewritten chains read, by the targets of their calls


def outline(chain: Chain, reached: Reached) -> tuple[ChainGraphs, list[Node], list[list[Node]]]:
    """Return the graphs of a chain, the nodes it captures, and for each step its side outputs.

    Args:
        chain: the chain.
        reached: what the steps of the chains inside of it read.
    """
    inside, states = chain.nodes, chain.states
    inputs = [_inputs(step, now) for step, now in zip(chain.steps, states, strict=False)]
    captures = list(dict.fromkeys(node for _, read in inputs for node in read if node not in inside))
    sides = [side_outputs(step) for step in chain.steps]
    position = {node: i for i, node in enumerate([*captures, *(node for side in sides for node in side)])}
    steps = tuple(
        _outline_step(step, now, read, position, side, reached)
        for step, now, read, side in zip(chain.steps, states, inputs, sides, strict=False)
    )
    roots = {target.split(".")[0] for step in steps for target in step.targets}
    # A module may have several names: called by one, and what is in it read by another.
    containers = tuple(container for container in chain.containers if container.path.split(".")[0] in roots)
    return ChainGraphs(chain.name, steps, _taps(chain), chain.streams, containers), captures, sides


def _inputs(step: Step, states: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """Return the present states that a step takes, and its captures: what else it reads but parameters and buffers."""
    taken = {*step.skips, *step.reads}
    captures = [node for node in step.reads if node not in states and node.op != "get_attr"]
    return [state for state in states if state in taken], captures


def side_outputs(step: Step) -> list[Node]:
    """Return the nodes inside a step that are read outside it, but for its ends."""
    ends = step.outs
    return [node for node in sorted(step.nodes) if node not in ends and not step.nodes.issuperset(node.users)]


def _taps(chain: Chain) -> tuple[tuple[int, int], ...]:
    """Return pairs (t, stream) for the states after t steps that others than steps read which find them in place."""
    born: dict[Node, tuple[int, int]] = {}
    readers: dict[Node, set[Node]] = defaultdict(set)
    for t, (step, states) in enumerate(zip(chain.steps, chain.states, strict=False), 1):
        for state in states:
            readers[state] |= step.nodes
        born.update((update.out, (t, update.stream)) for update in step.updates)
        for update in step.updates:
            readers[update.out] |= step.nodes
    ends = chain.ends
    return tuple(at for state, at in born.items() if state not in ends and set(state.users) - readers[state])


def _outline_step(
    step: Step,
    states: Sequence[Node],
    inputs: tuple[list[Node], list[Node]],
    captures: dict[Node, int],
    sides: Sequence[Node],
    reached: Reached,
) -> StepGraphs:
    taken, read = inputs
    is_map = all(update.kind == "map" for update in step.updates)
    names = _argument_names(taken, read)
    original = _graph_of(step, [*taken, *read], names, sides, without_skip=False)
    branch = original if is_map else _graph_of(step, [*taken, *read], names, sides, without_skip=True)
    return StepGraphs(
        path=step.path,
        kinds=tuple(update.kind for update in step.updates),
        branch=branch,
        original=original,
        captures=tuple(captures[node] for node in read),
        targets=tuple(dict.fromkeys(_targets(original, reached))),
        sides=tuple(node.name for node in sides),
        reads=tuple(states.index(state) for state in taken),
        writes=tuple(update.stream for update in step.updates),
        paths=tuple(update.path for update in step.updates) if len(step.updates) > 1 else (),
    )


def _targets(graph: Graph, reached: Reached) -> Iterator[str]:
    """Yield the paths that a graph reads; of what it hands to an inner chain call only what the chain's steps read."""
    calls = [node for node in graph.find_nodes(op="call_module") if node.target in reached]
    handed = {root for call in calls for root in call.args[2].values()}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node not in handed:
            yield str(node.target)
            yield from reached.get(str(node.target), ())


def _graph_of(
    step: Step, inputs: Sequence[Node], names: Sequence[str], sides: Sequence[Node], *, without_skip: bool
) -> Graph:
    """Return the step as a graph of its own; without the skips, what it adds to them."""
    terms = {node: update for update in step.updates for node in update.add.sums}

    def copy(graph: Graph, node: Node, lookup: Lookup) -> Node:
        if node not in terms:
            return graph.node_copy(node, lookup)
        update = terms[node]
        if without_skip and update.kind == "residual":
            return _rest_of_sum(node, update.term, graph, lookup)
        return _sum(node, graph, lookup)

    graph, copies = extract(sorted(step.nodes), inputs, (*step.outs, *sides), names=names, copy=copy)
    _erase_unread_skips(step, copies, graph)
    graph.lint()
    return graph


def _argument_names(states: Sequence[Node], captures: Sequence[Node]) -> list[str]:
    """Return ``x`` for a state alone; else, and for captures, their own names, changed where they are ``x`` too."""
    if len(states) > 1:
        return [node.name for node in (*states, *captures)]
    taken = {node.name for node in (*states, *captures)}
    names = ["x"]
    for node in captures:
        name = node.name
        while name == "x" or (name != node.name and name in taken):
            name += "_"
        names.append(name)
    return names


def _sum(node: Node, graph: Graph, lookup: Lookup) -> Node:
    copied = graph.node_copy(node, lookup)
    copied.target = sums.out_of_place(node)
    return copied


def _rest_of_sum(node: Node, skip: Node, graph: Graph, lookup: Lookup) -> Node:
    """Copy a sum without its skip; a sum in which the skip is not a term itself stays a sum."""
    terms = sums.terms(node) or ()
    rest = [term for term in terms if term.node is not skip]
    if len(rest) == len(terms):
        return _sum(node, graph, lookup)
    (term,) = rest
    product = lookup(term.factors[0])
    for factor in term.factors[1:]:
        product = _inherit(graph.call_function(operator.mul, (product, lookup(factor))), node)
    if term.scale == -1:
        return _inherit(graph.call_function(operator.neg, (product,)), node)
    return product if term.scale == 1 else _inherit(graph.call_function(operator.mul, (product, term.scale)), node)


def _inherit(new: Node, old: Node) -> Node:
    new.meta = dict(old.meta)
    return new


def _erase_unread_skips(step: Step, copies: dict[Node, Node], graph: Graph) -> None:
    """Erase value-preserving operations that only a dropped skip went through."""
    for node in (node for update in step.updates for node in update.add.skip_path):
        copied = copies.get(node)
        if node in step.nodes and copied is not None and not copied.users:
            graph.erase_node(copied)
