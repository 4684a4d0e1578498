"""Read the sizes in a graph of Dynamo's off its inputs, so that they do not depend on the tensor they were read off."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mfx_passes.ir.nodes import tag_size


def read_sizes_off_inputs(graph: Graph) -> None:
    """Replace sizes by numbers where known, else by sizes of the graph's inputs, whichever tensor they were read off.

    Before::

        embeddings = ...; size = embeddings.size(); length = size[1]; cache.copy_(x); last = -length

    After::

        last = -s27; embeddings = ...; cache.copy_(x)

    So what is computed of sizes alone (positions, masks) does not depend on the stream they were read off. Nor does it
    stand behind an operation that nothing may be moved past: all that is computed of inputs' sizes alone comes first.
    Sizes are tagged with what they are the sum of.
    """
    known: dict[Any, Node] = {}
    own: set[Node] = set()
    last: Node | None = None
    for node in list(graph.nodes):
        if node.op == "placeholder":
            last = node
        value = node.meta.get("example_value")
        if not isinstance(value, torch.SymInt):
            continue
        size = value.node.expr
        _tag(node, size)
        if node.op == "placeholder":
            own.add(known.setdefault(size, node))
        elif size.is_number or size in known:
            _replace(node, int(size) if size.is_number else known[size])
        elif last is not None and own.issuperset(node.all_input_nodes):
            last.append(node)
            last = known[size] = node
            own.add(node)
    for node in reversed(graph.find_nodes(op="call_method", target="size")):
        if not node.users:
            graph.erase_node(node)


def _replace(node: Node, value: Any) -> None:
    for user in list(node.users):
        user.args = map_arg(user.args, lambda other: value if other is node else other)
        user.kwargs = map_arg(user.kwargs, lambda other: value if other is node else other)
    node.graph.erase_node(node)


def _tag(node: Node, size: Any) -> None:
    """Tag a node with a size as a sum of products of sizes, if it is one."""
    terms = {product: factor for product, factor in size.expand().as_coefficients_dict().items() if factor}
    if all(factor.is_Integer and (product == 1 or product.is_nonnegative) for product, factor in terms.items()):
        tag_size(node, {None if product == 1 else str(product): int(factor) for product, factor in terms.items()})
