"""Puts one momentum call in the place of each chain. The only pass that changes the function of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.find.nesting import Nesting
from mfx_passes.ir import Chain, ChainGraphs, tag_momentum_call
from mfx_passes.ops import vocabulary
from mfx_passes.ops.vocabulary import Modules, reads_size_only
from mfx_passes.rewrite.outline import outline

Insert = Callable[[ChainGraphs], tuple[str, str | None]]
"""Takes a chain's graphs and returns the name of the module that will run them, a ``call_module`` target.

That module is called with ``(xs, captures, roots)``: a tuple of the streams' states, a tuple of captures, and the
attributes of the model that the steps reach into, by name. It returns the end states, the taps and the side outputs: a
tuple, or the only one of them. The other name is that of a module that computes the initial velocity from the states,
handed over as a fourth argument, or None.
"""


def rewrite(graph: Graph, nesting: Nesting, modules: Modules, insert: Insert) -> None:
    """Replace chains, the innermost first, by momentum calls.

    Before::

        add = self.blocks.0.fc(x) + x
        add_1 = self.blocks.1.fc(add) + add

    After::

        blocks = self.blocks
        momentum_blocks = self.momentum_blocks((x,), (), {"blocks": blocks})

    Args:
        graph: the graph, changed in place.
        nesting: its chains.
        modules: the modules its nodes call.
        insert: takes each chain's graphs and names the module that runs them.
    """
    rewriter = _Rewriter(graph, nesting, modules, insert)
    for chain in reversed(nesting.chains):
        rewriter.rewrite(chain)
    for node in reversed(graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.erase_node(node)
    graph.lint()


class _Rewriter:
    """Rewrites chain after chain, and brings the steps of the chains that follow up to date."""

    def __init__(self, graph: Graph, nesting: Nesting, modules: Modules, insert: Insert) -> None:
        self._graph = graph
        self._nesting = nesting
        self._modules = modules
        self._insert = insert
        sums = {node for chain in nesting.chains for step in chain.steps for node in step.sums}
        self._mutations = Mutations(GraphIndex(graph, modules), sums)
        inside = sorted({node for chain in nesting.chains for node in chain.nodes})
        self._written = {node for mutation in self._mutations.at(inside) for node in mutation.family}
        self._replaced: dict[Node, Node] = {}
        self._reached: dict[str, tuple[str, ...]] = {}

    def rewrite(self, chain: Chain) -> None:
        for update in chain.updates:
            update.skip = self._replaced.get(update.skip, update.skip)
            update.term = self._replaced.get(update.term, update.term)
        self._redirect_early_readers(chain)
        graphs, captures, sides = outline(chain, self._reached)
        inside = chain.nodes
        anchor, late = _place(chain, inside, captures)
        anchor, kept = self._copied(captures, anchor)
        call, added = _insert_call(self._graph, graphs, chain, kept, anchor, self._insert)
        added += [node for node in kept if node not in captures]
        self._reached[str(call.target)] = tuple(target for step in graphs.steps for target in step.targets)
        states = chain.states
        taps = [states[t][stream] for t, stream in graphs.taps]
        outputs = [*states[-1], *taps, *(node for side in sides for node in side)]
        values = _unpack(self._graph, call, outputs)
        _move_behind(values[-1], late)
        self._read_instead(outputs, values, inside)
        for node in sorted(inside, reverse=True):
            self._graph.erase_node(node)
        read = [value for value in values if value.users]
        for value in set(values) - set(read) - {call}:
            self._graph.erase_node(value)
        for step in self._nesting.around(chain):
            step.nodes -= inside
            step.nodes |= {*added, *read}

    def _copied(self, captures: Sequence[Node], anchor: Node) -> tuple[Node, list[Node]]:
        """Return captures with copies of those that the next call may change, and the node to put the call behind.

        What a step writes into, as it may without gradients, is not copied: the write would be lost.

        Before::

            u = self.u.mul_(0.5)

        After::

            u = self.u.mul_(0.5); clone = u.clone()

        """
        kept: list[Node] = []
        for node in captures:
            is_tensor = isinstance(node.meta.get("val"), Tensor | None)
            if is_tensor and node not in self._written and self._mutations.may_change_again(node):
                with self._graph.inserting_after(_behind_inputs(anchor)):
                    anchor = self._graph.call_method("clone", (node,))
                anchor.meta = dict(node.meta)
                node = anchor
            kept.append(node)
        return anchor, kept

    def _redirect_early_readers(self, chain: Chain) -> None:
        """Have nodes that read a state before the next step does read a view, which the next step makes first.

        They will run behind the whole chain, but their gradient arrives at the view's place: gradients of a state are
        summed in the same order as before.
        """
        inside = {node: step for step in chain.steps for node in step.nodes}
        skips = {update.skip: step for step in chain.steps for update in step.updates}
        for step in chain.steps:
            for out in [out for out in step.outs if out in skips]:
                readers = list(out.users)
                first = min(node for node in readers if node in inside and inside[node] is not step)
                early = [node for node in readers if node < first and node not in inside]
                if not early:
                    continue
                after = inside[first]
                with self._graph.inserting_before(first):
                    view = self._graph.call_method("view_as", (out, out))
                view.meta = dict(out.meta)
                for node in early:
                    node.replace_input_with(out, view)
                for holder in (after, *self._nesting.around(chain)):
                    holder.nodes.add(view)

    def _read_instead(self, outputs: Sequence[Node], values: Sequence[Node], inside: Collection[Node]) -> None:
        for old, new in zip(outputs, values, strict=True):
            for user in [user for user in old.users if user not in inside]:
                user.replace_input_with(old, new)
            _protect(self._graph, new, self._modules)
            self._replaced[old] = new


def _move_behind(last: Node, late: Sequence[Node]) -> None:
    for node in late:
        last.append(node)
        last = node


def _place(chain: Chain, inside: set[Node], captures: Sequence[Node]) -> tuple[Node, list[Node]]:
    """Return the node to put the momentum call behind, and the nodes that must move behind the call.

    That is where the chain first reads its start, if possible: gradients are summed in the order of the forward pass.
    """
    readers = [
        node
        for start in chain.starts
        for node in start.users
        if node in inside and node.users and not reads_size_only(node)
    ]
    for first in (min(readers, default=min(inside)), min(inside)):
        anchor = max((first.prev, *chain.starts, *captures))
        late = _late_readers(inside, anchor)
        if not late:
            break
    return anchor, late


def _late_readers(inside: Collection[Node], anchor: Node) -> list[Node]:
    """Return the nodes that stand before the momentum call's place but read what it computes."""
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


def _behind_inputs(anchor: Node) -> Node:
    while anchor.op == "placeholder" and anchor.next.op == "placeholder":
        anchor = anchor.next
    return anchor


def _insert_call(
    graph: Graph, graphs: ChainGraphs, chain: Chain, captures: Sequence[Node], anchor: Node, insert: Insert
) -> tuple[Node, list[Node]]:
    """Insert a momentum call; return it, and the nodes (it is one of them) that steps around it own from now on."""
    anchor = _behind_inputs(anchor)
    added: list[Node] = []
    roots: dict[str, Node] = {}
    for name in dict.fromkeys(target.split(".")[0] for step in graphs.steps for target in step.targets):
        with graph.inserting_after(anchor):
            anchor = graph.get_attr(name)
        roots[name] = anchor
    target, velocity = insert(graphs)
    starts = tuple(chain.starts)
    args: tuple[Any, ...] = (starts, tuple(captures), roots)
    if velocity is not None:
        with graph.inserting_after(anchor):
            anchor = graph.call_module(velocity, starts)
        added.append(anchor)
        args = (*args, anchor)
    with graph.inserting_after(anchor):
        call = graph.call_module(target, args)
    last = chain.steps[-1].outs[-1]
    call.meta = {key: last.meta[key] for key in ("stack_trace", "nn_module_stack", "custom") if key in last.meta}
    tag_momentum_call(call, chain.name)
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
    """Insert a clone before in-place users of a state, which the backward pass needs unchanged."""
    for user in list(value.users):
        if vocabulary.mutated_operand(user, modules) is value:
            with graph.inserting_before(user):
                copied = graph.call_method("clone", (value,))
            copied.meta = dict(value.meta)
            user.replace_input_with(value, copied)
        elif vocabulary.may_alias(user, modules) and vocabulary.preserved(user) is value:
            _protect(graph, user, modules)
