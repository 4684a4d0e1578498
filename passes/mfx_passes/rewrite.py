"""Put one momentum call in the place of each chain. The only pass that changes what a graph computes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.fx import Graph, Node

from mfx_passes import vocabulary
from mfx_passes.ir import Chain, ChainGraphs
from mfx_passes.outline import outline
from mfx_passes.vocabulary import Modules

Insert = Callable[[ChainGraphs], tuple[str, str | None]]
"""Keeps a chain's graphs and returns the name of the module that will run them, a ``call_module`` target.

That module is called with ``(x, captures, roots)``: the state, a tuple of captures, and the attributes of the model that
the steps reach into, by name. It returns the end state, or a tuple of it, the taps and the side outputs. The second name
is that of a module that computes the initial velocity from the state, handed over as a fourth argument, or None.
"""


def rewrite(graph: Graph, chains: Sequence[Chain], modules: Modules, insert: Insert) -> None:
    """Replace chains, the innermost first, by momentum calls.

    Before::

        add = self.blocks.0.fc(x) + x
        add_1 = self.blocks.1.fc(add) + add

    After::

        blocks = self.blocks
        momentum_blocks = self.momentum_blocks(x, (), {"blocks": blocks})

    Args:
        graph: the graph, changed in place.
        chains: its chains, outermost first.
        modules: the modules its nodes call.
        insert: takes each chain's graphs and names the module that runs them.
    """
    for chain in reversed(chains):
        _rewrite_chain(graph, chain, chains, modules, insert)
    for node in reversed(graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.erase_node(node)
    graph.lint()


def _rewrite_chain(graph: Graph, chain: Chain, chains: Sequence[Chain], modules: Modules, insert: Insert) -> None:
    graphs, captures, sides = outline(chain)
    inside = chain.nodes
    anchor = max((chain.start, *captures))
    late = _late_readers(graph, inside, anchor)
    call, added = _insert_call(graph, graphs, chain, captures, anchor, insert)
    states = [chain.steps[t - 1].out for t in graphs.taps]
    outputs = [chain.steps[-1].out, *states, *(node for side in sides for node in side)]
    values = _unpack(graph, call, outputs)
    last = values[-1]
    for node in late:
        last.append(node)
        last = node
    replaced = dict(zip(outputs, values, strict=True))
    for old, new in replaced.items():
        for user in [user for user in old.users if user not in inside]:
            user.replace_input_with(old, new)
        _protect(graph, new, modules)
    for node in sorted(inside, reverse=True):
        graph.erase_node(node)
    read = [value for value in values if value.users]
    for value in set(values) - set(read) - {call}:
        graph.erase_node(value)
    _update(chains, inside, replaced, {*added, *read})


def _late_readers(graph: Graph, inside: Collection[Node], anchor: Node) -> list[Node]:
    """Nodes that stand before the momentum call's place but read what it computes."""
    fed = set(inside)
    late = []
    for node in _through(min(inside), anchor):
        if node not in fed and any(source in fed for source in node.all_input_nodes):
            fed.add(node)
            late.append(node)
    return late


def _through(first: Node, last: Node) -> list[Node]:
    nodes = []
    while first < last or first is last:
        nodes.append(first)
        first = first.next
        if first.op == "root":
            break
    return nodes


def _insert_call(
    graph: Graph, graphs: ChainGraphs, chain: Chain, captures: Sequence[Node], anchor: Node, insert: Insert
) -> tuple[Node, list[Node]]:
    """The call, and the nodes that fetch the attributes of the model it reaches into."""
    while anchor.op == "placeholder" and anchor.next.op == "placeholder":
        anchor = anchor.next
    added: list[Node] = []
    roots: dict[str, Node] = {}
    for name in dict.fromkeys(target.split(".")[0] for step in graphs.steps for target in step.targets):
        with graph.inserting_after(anchor):
            anchor = graph.get_attr(name)
        roots[name] = anchor
    target, velocity = insert(graphs)
    args: tuple[Any, ...] = (chain.start, tuple(captures), roots)
    if velocity is not None:
        with graph.inserting_after(anchor):
            anchor = graph.call_module(velocity, (chain.start,))
        added.append(anchor)
        args = (*args, anchor)
    with graph.inserting_after(anchor):
        call = graph.call_module(target, args)
    last = chain.steps[-1].out
    call.meta = {key: last.meta[key] for key in ("stack_trace", "nn_module_stack", "custom") if key in last.meta}
    return call, [*added, call]


def _unpack(graph: Graph, call: Node, outputs: Sequence[Node]) -> list[Node]:
    if len(outputs) == 1:
        call.meta.update(_value_of(outputs[0]))
        return [call]
    values: list[Node] = []
    for i, output in enumerate(outputs):
        with graph.inserting_after(values[-1] if values else call):
            values.append(graph.call_function(operator.getitem, (call, i)))
        values[-1].meta = dict(output.meta)
    return values


def _value_of(node: Node) -> dict[str, object]:
    return {"val": node.meta["val"]} if "val" in node.meta else {}


def _protect(graph: Graph, value: Node, modules: Modules) -> None:
    """Who changes a state in place gets a copy of it: the backward pass starts from the states."""
    for user in list(value.users):
        if vocabulary.mutated_operand(user, modules) is value:
            with graph.inserting_before(user):
                copied = graph.call_method("clone", (value,))
            copied.meta = dict(value.meta)
            user.replace_input_with(value, copied)
        elif vocabulary.may_alias(user, modules) and vocabulary.preserved(user) is value:
            _protect(graph, user, modules)


def _update(chains: Sequence[Chain], gone: set[Node], replaced: dict[Node, Node], added: set[Node]) -> None:
    """Tell the steps around a rewritten chain what stands in its place."""
    for step in (step for chain in chains for step in chain.steps):
        step.skip = replaced.get(step.skip, step.skip)
        step.term = replaced.get(step.term, step.term)
        if gone <= step.nodes:
            step.nodes -= gone
            step.nodes |= added
