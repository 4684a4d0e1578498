"""Folds the nodes that make up a whole module call into that call again.

A traced graph is flat: hooks on the attention module of a block would not fire, and replacing it would do nothing.
Whatever lies within one branch (or outside all chains) can be called as the module it came from.

Before::

    fc1 = self.blocks.0.mlp.fc1(norm)
    gelu = torch._C._nn.gelu(fc1)
    fc2 = self.blocks.0.mlp.fc2(gelu)

After::

    blocks_0_mlp = self.blocks.0.mlp(norm)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mfx_passes.analysis.mutations import Mutations
from mfx_passes.find.nesting import Nesting
from mfx_passes.ir import ModuleCall, Step, block_of, tag_block
from mfx_passes.ops.gradients import through_others
from mfx_passes.ops.vocabulary import returns_operand

T = TypeVar("T")

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


_IN_GRAPH: set[Any] = set()


def stays_in_graph(function: T) -> T:
    """Declare that a graph needs its calls of a function: what lies around one is not folded into a module call."""
    _IN_GRAPH.add(function)
    return function


def must_stay(node: Node) -> bool:
    """True if a node calls a function that was declared so by `stays_in_graph`."""
    return node.op == "call_function" and node.target in _IN_GRAPH


def fold_calls(
    graph: Graph,
    calls: Sequence[ModuleCall],
    nesting: Nesting,
    reread: Mapping[Node, Node],
    mutations: Mutations,
    may_open: Callable[[str], bool],
) -> tuple[list[ModuleCall], list[str]]:
    """Fold every call that can be folded, the outermost first, and bring the chains up to date.

    Args:
        graph: the graph.
        calls: the module calls the tracer walked through.
        nesting: the chains.
        reread: see `Findings`.
        mutations: the in-place operations of the graph.
        may_open: tells whether the module at a path may be left open, so that blocks in it are called one by one.

    Returns:
        The calls that were not folded: their modules' own ``forward`` and hooks do not run. And the paths of those of
        them that are open for the blocks in them alone.
    """
    folder = _Folder(graph, nesting, reread, mutations, may_open)
    # A call that does nothing but call another has the same nodes, and the shorter path.
    outermost_first = sorted(calls, key=lambda call: (-len(call.nodes), call.target.count(".")))
    flat = [call for call in outermost_first if not folder.fold(call)]
    folder.update()
    return flat, folder.opened


class _Folder:
    def __init__(
        self,
        graph: Graph,
        nesting: Nesting,
        reread: Mapping[Node, Node],
        mutations: Mutations,
        may_open: Callable[[str], bool],
    ) -> None:
        self._graph = graph
        self._may_open = may_open
        self.opened: list[str] = []
        self._mutations = mutations
        self._nesting = nesting
        self._reread = reread
        self._single: set[Node] = set()  # sums that become part of the momentum call: no module call may hold them
        self._replaced: dict[Node, Node] = {}
        self._gone: set[Node] = set()
        self._items: list[Node] = []
        for update in (update for chain in nesting.chains for update in chain.updates):
            if update.kind == "residual":
                self._single |= update.add.sums

    def fold(self, call: ModuleCall) -> bool:
        """Fold one call; True also if it lies in one that is folded already."""
        nodes = {node for node in call.nodes if node.op != "get_attr"}
        if not nodes or nodes & self._gone:
            return True
        first = min(nodes)
        call = self._after_mutations(call, first, nodes)
        if not self._may_fold(call, nodes):
            return False
        holds_blocks = len(set(map(block_of, nodes))) > 1
        if holds_blocks and self._may_open(call.target):
            self.opened.append(call.target)
            return False
        with self._graph.inserting_before(first):
            folded = self._graph.call_module(call.target, self._current(call.args), self._current(call.kwargs))
        folded.meta = _meta(first, call)
        if holds_blocks:
            tag_block(folded, None)
        self._replace(call.output, folded, nodes, self._nesting.holders(first))
        for node in sorted(nodes, reverse=True):
            self._graph.erase_node(node)
        self._gone |= nodes
        return True

    def _after_mutations(self, call: ModuleCall, first: Node, nodes: set[Node]) -> ModuleCall:
        """Return the call with the values its arguments and output had then, where they were changed in place."""

        def at_start(node: Node) -> Node:
            node = self._changed(node, lambda mutator: mutator < first)
            return self._reread[node] if node in self._reread and self._reread[node] < first else node

        def at_end(node: Node) -> Node:
            return self._changed(node, lambda mutator: mutator < first or mutator in nodes)

        return replace(
            call,
            args=map_arg(call.args, at_start),
            kwargs=map_arg(call.kwargs, at_start),
            output=map_arg(call.output, at_end),
        )

    def _changed(self, node: Node, when: Callable[[Node], bool]) -> Node:
        """Return the in-place operation that holds the value of a node after it was changed."""
        for mutation in self._mutations.touching([node]):
            is_returned = mutation.operand is node and not mutation.beside and returns_operand(mutation.node)
            if is_returned and when(mutation.node):
                return self._changed(mutation.node, when)
        return node

    def _current(self, args: Any) -> Any:
        return map_arg(args, lambda node: self._replaced.get(node, node))

    def _may_fold(self, call: ModuleCall, nodes: set[Node]) -> bool:
        if len({self._nesting.innermost(node) for node in nodes}) > 1 or nodes & self._single:
            return False
        if any(map(must_stay, nodes)):
            return False
        inputs = {self._replaced.get(node, node) for node in _nodes_in([call.args, call.kwargs])}
        read = {source for node in nodes for source in node.all_input_nodes if source.op != "get_attr"} - nodes
        returned = set(_nodes_in(call.output))
        return (
            read <= inputs
            and all(self._may_read(node, nodes) for node in inputs - read)
            and all(node in returned or nodes.issuperset(node.users) for node in nodes)
            and _is_plain([call.args, call.kwargs, call.output])
            and all(_is_own(mutation.family, nodes) for mutation in self._mutations.at(nodes))
            and through_others(nodes, {}) is None  # a segment that holds it must not be recomputed alone
        )

    def _may_read(self, unread: Node, nodes: set[Node]) -> bool:
        """True if an argument that the module does not use may be read: it must not become an unchecked capture."""
        holders = self._nesting.holders(next(iter(nodes)))
        return all(unread in step.nodes or unread in step.skips or unread in step.reads for step in holders)

    def _replace(self, output: Any, value: Node, nodes: set[Node], steps: list[Step]) -> None:
        """Have readers of the call's output, a node or a structure of them, read it from ``value``."""
        for step in steps:
            step.nodes -= nodes
            step.nodes.add(value)
        if isinstance(output, Node):
            if output in nodes:
                output.replace_all_uses_with(value)
                self._replaced[output] = value
                if "val" in output.meta:
                    value.meta["val"] = output.meta["val"]
            return
        for key, part in _items(output):
            if any(node in nodes for node in _nodes_in(part)):
                with self._graph.inserting_after(value):
                    item = self._graph.call_function(operator.getitem, (value, key))
                item.meta = dict(value.meta)
                self._items.append(item)
                self._replace(part, item, nodes, steps)

    def update(self) -> None:
        """Point the steps to what replaced their nodes, and drop the items of outputs that are not read."""
        unread = self._erase_unread_items()
        for step in (step for chain in self._nesting.chains for step in chain.steps):
            for update in step.updates:
                update.skip = self._replaced.get(update.skip, update.skip)
                update.term = self._replaced.get(update.term, update.term)
                update.out = self._replaced.get(update.out, update.out)
            step.nodes -= unread

    def _erase_unread_items(self) -> set[Node]:
        unread = set()
        for item in reversed(self._items):
            if not item.users:
                self._graph.erase_node(item)
                unread.add(item)
        return unread


def _is_own(family: Iterable[Node], nodes: set[Node]) -> bool:
    """True if an in-place operation changes only buffers and values made in a call."""
    return all(node in nodes or node.op == "get_attr" for node in family)


def _meta(first: Node, call: ModuleCall) -> dict[str, Any]:
    meta: dict[str, Any] = {key: first.meta[key] for key in ("stack_trace", "custom") if key in first.meta}
    stack = first.meta.get("nn_module_stack")
    if stack:
        meta["nn_module_stack"] = _up_to(stack, call.target)
    return meta


def _up_to(stack: Any, target: str) -> Any:
    kept = type(stack)()
    for key, value in stack.items():
        kept[key] = value
        if value[0] == target:
            break
    return kept


def _nodes_in(args: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(args, found.append)
    return found


def _items(output: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(output, dict):
        return iter(output.items())
    return iter(enumerate(output)) if isinstance(output, list | tuple) else iter(())


def _is_plain(args: Any) -> bool:
    """True if a call with these arguments can be written into a graph."""
    if isinstance(args, dict):
        return all(isinstance(key, _PLAIN) for key in args) and _is_plain(list(args.values()))
    if isinstance(args, list) or type(args) is tuple:
        return all(map(_is_plain, args))
    return isinstance(args, (Node, *_PLAIN))
