"""A rewritten graph as a ``networkx.DiGraph``, with the steps of its chains inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

import mfx_passes
from mfx.program.chain_call import Momentum

if TYPE_CHECKING:
    import networkx as nx


def view_of(module: fx.GraphModule) -> nx.DiGraph:
    """Return the view of a rewritten graph; the shape of a state, if it is the only one, is that of the last call."""
    calls = {name: call for name, call in module.named_children() if isinstance(call, Momentum)}
    view = mfx_passes.to_networkx(module.graph, chains={name: call.graphs for name, call in calls.items()})
    for node in module.graph.find_nodes(op="call_module"):
        call = calls.get(str(node.target))
        if call is not None and len(call.streams) == 1:
            (stream,) = call.streams
            view.nodes[node.name].update(shape=str(stream.shape), dtype=str(stream.dtype).removeprefix("torch."))
    return view
