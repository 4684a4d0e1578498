"""Check that all graphs of a net, in training and in evaluation, of it and of its modules, have the same chains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from mfx.capture.decisions import diverge
from mfx.program.chain_call import Momentum
from mfx.program.record import Record
from mfx.program.rewritten import RewrittenGraph
from mfx_passes import MfxError, paths


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


def check_same_pieces(
    net: nn.Module, graphs: Sequence[RewrittenGraph], others: Sequence[RewrittenGraph], *, alike: bool
) -> None:
    """Check that two calls that ran in pieces have the same chains.

    Args:
        net: the net.
        graphs: the graphs that one call ran, in order.
        others: those of the other one.
        alike: True if nothing but the training mode and the values of tensors differs: then no chain may be missing.

    Raises:
        MfxError: they have others, and one of them has momentum.
    """
    here, there = _merged(graphs), _merged(others)
    moving, others_moving = _moving(graphs, others), _moving(others, graphs)
    ran = [_ran(some, moving | others_moving) for some in (graphs, others)]
    if (alike and ran[0] != ran[1]) or here.differs(there, moving, others_moving):
        raise MfxError(
            f"{type(net).__name__} has other chains in one call than in another ({_lengths(graphs)} and "
            f"{_lengths(others)}, by number of steps): it is not one graph, and its pieces are not the same in both, "
            "so the network that is trained would not be the one that is evaluated. Momentumize a part of the model "
            "that is one graph, or use skip= to leave out what differs."
        )


def check_whole(net: nn.Module, graph: RewrittenGraph, pieces: Sequence[RewrittenGraph]) -> None:
    """Check that a graph of a net has the chains that a call has which runs in pieces.

    Raises:
        MfxError: one of them has others.
    """
    record = _merged(pieces)
    if pieces and graph.record.differs(record, _moving([graph], pieces), _moving(pieces, [graph])):
        raise MfxError(
            f"{type(net).__name__} has other chains in one call than in another: where it is one graph ({graph.mode} "
            f"mode), they are {graph.chain_lengths}, by number of steps; where it is not, it runs in pieces, and they "
            f"are {_lengths(pieces)}. So the network that is trained would not be the one that is evaluated. "
            "Momentumize the part of the model that both calls have in common, or use skip= to leave out what differs."
        )


def _merged(graphs: Iterable[RewrittenGraph]) -> Record:
    return Record.merged(graph.record for graph in graphs) or Record({}, None, frozenset())


def _ran(graphs: Iterable[RewrittenGraph], names: set[str]) -> list[list[Any]]:
    """Return the steps of the chains with these names that graphs have, in the order of the graphs."""
    chains = [[steps for name, steps in graph.chains.items() if name in names] for graph in graphs]
    return [steps for steps in chains if steps]


def _moving(graphs: Iterable[RewrittenGraph], others: Sequence[RewrittenGraph]) -> set[str]:
    """Return the chains of graphs that others have to have: in evaluation, not those whose γ has signs."""
    return {
        chain
        for graph in graphs
        for chain in graph.moving
        if chain in graph.steady or any(other.training and chain not in other.evaluated for other in others)
    }


def _lengths(graphs: Iterable[RewrittenGraph]) -> list[dict[str, int]]:
    return [graph.chain_lengths for graph in graphs if graph.calls]


def check_per_module(
    net: nn.Module,
    graph: RewrittenGraph,
    modules: Mapping[str, Sequence[RewrittenGraph]],
    pieces: Sequence[RewrittenGraph] = (),
    *,
    training: bool = True,
) -> None:
    """Check that a graph of a net has the chains that a call has which runs module by module.

    Args:
        net: the net.
        graph: the graph.
        modules: the graphs of the modules that are rewritten each on its own, by path.
        pieces: the graphs of the stretches between its graph breaks.
        training: False if such calls are in evaluation alone, where γ that has signs is 0.

    Raises:
        MfxError: a chain lies in none of these modules, or has run in pieces, or one of them has other chains.
    """
    check_whole(net, graph, pieces)
    in_pieces = [call for piece in pieces for call in piece.calls.values()]
    for call in _with_momentum(graph, graph.moving if training else graph.steady):
        if any(_are_one(call, other) for other in in_pieces):
            continue
        held = {path: [paths.is_inside(p, path) for p in graph.sums[call.chain]] for path in modules}
        has_run_in_pieces = any(modules[path] and any(inside) and not all(inside) for path, inside in held.items())
        if has_run_in_pieces or not any(map(all, held.values())):
            raise MfxError(
                f"{type(net).__name__} has other chains in one call than in another: where it is one graph "
                f"({graph.mode} mode), they are {graph.chain_lengths}, by number of steps. Where it is not, its "
                f"modules are rewritten each on its own, and no module that it calls holds the chain {call.chain}, so "
                "the network that is trained would not be the one that is evaluated. Momentumize the part of the model "
                f"that both calls have in common, or use skip={call.chain!r}."
            )
    check_agreement(net, graph, chain.from_iterable(modules.values()))


def _contradict(one: RewrittenGraph, other: RewrittenGraph) -> bool:
    if one.shapes_known != other.shapes_known:
        return False  # one of them may still lose steps
    if one.captured.partial or other.captured.partial:
        return False  # see `check_same_pieces` and `check_whole`
    key, other_key = one.captured.binding.key, other.captured.binding.key
    if diverge(one.decisions, other.decisions):
        return False  # other values may, too
    if one.within == other.within:
        if key is not None and other_key is not None and key != other_key:
            return False  # other arguments may lead to other chains
        return one.record.differs(other.record, _moving([one], [other]), _moving([other], [one]))
    return _misses(one, other) or _misses(other, one)


def _misses(graph: RewrittenGraph, other: RewrittenGraph) -> bool:
    """True if another graph has a chain with momentum that this one has not, though it computes one of its steps."""
    own = list(graph.calls.values())
    return any(
        all(paths.is_inside(path, graph.within) for path in other.sums[call.chain])
        and any(graph.computes(step.path) for step in call.graphs.steps)
        and not any(_are_one(call, o) for o in own)
        for call in _with_momentum(other, _moving([other], [graph]))
    )


def _are_one(call: Momentum, other: Momentum) -> bool:
    """True if two calls run the same chain, known by its steps: a net may use one twice, and the next time thrice.

    A step without its dropout may have a longer path in common.
    """
    steps, others = call.graphs.steps, other.graphs.steps
    return len(steps) == len(others) and all(
        paths.is_inside(a.path, b.path) or paths.is_inside(b.path, a.path) for a, b in zip(steps, others, strict=True)
    )


def _with_momentum(graph: RewrittenGraph, moving: set[str]) -> Iterator[Momentum]:
    return (call for call in graph.calls.values() if call.chain in moving)
