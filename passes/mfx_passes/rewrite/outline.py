"""Cuts the steps of a chain out of their graph: each becomes a small graph with explicit inputs."""

from __future__ import annotations

import operator
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
    inside = chain.nodes
    read = dict.fromkeys(node for step in chain.steps for node in step.inputs()[1:])
    captures = [node for node in read if node not in inside]
    sides = [side_outputs(step) for step in chain.steps]
    position = {node: i for i, node in enumerate([*captures, *(node for side in sides for node in side)])}
    steps = tuple(_outline_step(step, position, side, reached) for step, side in zip(chain.steps, sides, strict=True))
    return ChainGraphs(chain.name, steps, _taps(chain)), captures, sides


def side_outputs(step: Step) -> list[Node]:
    """Return the nodes inside a step that are read outside it, but for its end."""
    return [node for node in sorted(step.nodes) if node is not step.out and not step.nodes.issuperset(node.users)]


def _taps(chain: Chain) -> tuple[int, ...]:
    """Return the numbers of the states that are read by others than the next step."""
    following = zip(chain.steps, chain.steps[1:], strict=False)
    return tuple(t for t, (step, after) in enumerate(following, 1) if set(step.out.users) - step.nodes - after.nodes)


def _outline_step(step: Step, captures: dict[Node, int], sides: Sequence[Node], reached: Reached) -> StepGraphs:
    inputs = step.inputs()
    original = _graph_of(step, inputs, sides, without_skip=False)
    branch = original if step.kind == "map" else _graph_of(step, inputs, sides, without_skip=True)
    return StepGraphs(
        path=step.path,
        kind=step.kind,
        branch=branch,
        original=original,
        captures=tuple(captures[node] for node in inputs[1:]),
        targets=tuple(dict.fromkeys(_targets(original, reached))),
        sides=tuple(node.name for node in sides),
    )


def _targets(graph: Graph, reached: Reached) -> Iterator[str]:
    """Yield the paths that a graph reads; of what it hands to an inner chain call only what the chain's steps read."""
    calls = [node for node in graph.find_nodes(op="call_module") if node.target in reached]
    handed = {root for call in calls for root in call.args[2].values()}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node not in handed:
            yield str(node.target)
            yield from reached.get(str(node.target), ())


def _graph_of(step: Step, inputs: Sequence[Node], sides: Sequence[Node], *, without_skip: bool) -> Graph:
    """Return the step as a graph of its own; without the skip, what it adds to the skip."""

    def copy(graph: Graph, node: Node, lookup: Lookup) -> Node:
        if node not in step.add.sums:
            return graph.node_copy(node, lookup)
        return _rest_of_sum(node, step.term, graph, lookup) if without_skip else _sum(node, graph, lookup)

    names = _argument_names(inputs)
    graph, copies = extract(sorted(step.nodes), inputs, (step.out, *sides), names=names, copy=copy)
    _erase_unread_skip(step, copies, graph)
    graph.lint()
    return graph


def _argument_names(inputs: Sequence[Node]) -> list[str]:
    """Return ``x`` for the state, and for captures their own names, changed where they are ``x`` too."""
    taken = {node.name for node in inputs}
    names = ["x"]
    for node in inputs[1:]:
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


def _erase_unread_skip(step: Step, copies: dict[Node, Node], graph: Graph) -> None:
    """Erase value-preserving operations that only the dropped skip went through."""
    for node in step.add.skip_path:
        copied = copies.get(node)
        if node in step.nodes and copied is not None and not copied.users:
            graph.erase_node(copied)
