"""Check that the graphs of a net, in training and in evaluation, have the same chains."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mfx.program.rewritten import RewrittenGraph
from mfx_passes import MfxError


def check_agreement(net: nn.Module, graph: RewrittenGraph, others: Iterable[RewrittenGraph]) -> None:
    """Check that a graph of a net has the chains of its others, or another network would be trained than evaluated.

    Raises:
        MfxError: the same part of the model has other chains in one of them.
    """
    for other in others:
        if other is not graph and _contradict(graph, other):
            modes = sorted({graph.mode, other.mode}, reverse=True)
            raise MfxError(
                f"{type(net).__name__} has other chains in one call than in another ({' and '.join(modes)} "
                f"mode; {graph.chain_lengths} and {other.chain_lengths}, by number of steps), so the network that is "
                "trained would not be the one that is evaluated. Use only= or skip= to leave out what differs."
            )


def _contradict(one: RewrittenGraph, other: RewrittenGraph) -> bool:
    if one.shapes_known != other.shapes_known:
        return False  # one of them may still lose steps
    if not (one.changes_function or other.changes_function):
        return False  # both are the model
    key, other_key = one.captured.binding.key, other.captured.binding.key
    if key is not None and other_key is not None and key != other_key:
        return False  # other arguments may lead to other chains
    return one.record.differs(other.record, one.chains, other.chains)
