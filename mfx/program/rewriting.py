"""Rewrites a captured graph by the options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from torch import fx, nn

from mfx.capture.captured import Captured
from mfx.capture.class_guards import guards_of_classes
from mfx.capture.guards import Guard
from mfx.capture.module_guards import guards_of
from mfx.capture.named_steps import check_steps
from mfx.engine import ARITHMETICS, ChainPlan, ChainSettings
from mfx.options.options import Options
from mfx.program.chain_call import Momentum, is_training
from mfx.program.memory_plans import NetPlans
from mfx.program.rewritten import RewrittenGraph, is_observed, selection_of
from mfx.program.velocity import velocity_target
from mfx_passes import ChainGraphs, paths, rewrite_graph
from mfx_passes.ir import Grounds
from mfx_passes.momentum_pass import call_name


def rewrite_captured(
    net: nn.Module,
    captured: Captured,
    options: Options,
    refused: Mapping[str, Grounds],
) -> RewrittenGraph:
    """Rewrite a captured graph.

    Args:
        net: the tree copy it was captured from.
        captured: the graph.
        options: those to rewrite it by.
        refused: sums to leave alone, with the grounds.

    Raises:
        MfxError: see `mfx_passes.rewrite_graph`.
    """
    graph, calls = captured.copy()
    modules = captured.modules_of(net)
    momenta: dict[str, Momentum] = {}
    taken = {*dir(net), *captured.modules}

    def insert(graphs: ChainGraphs) -> tuple[str, str | None]:
        name = call_name(graphs.name, {*taken, *momenta})
        momenta[name] = make_momentum(graphs, options)
        return name, velocity_target(net, graphs.name, options)

    may_open = None if options.budget.share == 1.0 or options.recompute == "all" else partial(_may_open, captured)
    selection = selection_of(options, captured, refused)
    rewritten = rewrite_graph(graph, modules, insert, selection, calls, may_open)
    if options.layers:
        lengths = {call.chain: len(call.graphs.steps) for call in momenta.values()}
        check_steps(captured.graph, lengths, rewritten.findings.rejections)
    flat = tuple(sorted({call.target for call in rewritten.flat}))
    leaves = {str(node.target) for node in captured.graph.find_nodes(op="call_module")}
    of_modules, changing = guards_of(net, leaves, captured.assigned, captured.names), captured.assigned.values()
    of_classes = guards_of_classes((g.module for g in of_modules), frozenset().union(*changing), captured.names)
    guards: list[Guard] = [*of_modules, *of_classes, *_guards_of_reads(graph, momenta, captured)]
    return RewrittenGraph(
        captured,
        graph,
        momenta,
        flat,
        {update.add.node.name: update.path for chain in rewritten.findings.chains for update in chain.updates},
        dict(refused),
        net.training,
        guards,
        options.within,
        recompute_between=options.plans and options.recompute == "all",
        verify=options.verify,
        evaluated=frozenset(c.chain for c in momenta.values() if not is_training(net, c.owner)),
        opened=tuple(captured.walked[path] for path in rewritten.opened),
    )


def _may_open(captured: Captured, path: str) -> bool:
    """True if a module need not be called as a whole: no hook of its own, no compilation and no effect would be lost.

    Hooks for all modules (`torch.nn.modules.module.register_module_forward_hook`) do not see it, nor the containers of
    chains.
    """
    changes = any(effect.path == path for effect in captured.effects)
    return path in captured.walked and not changes and not is_observed(captured.walked[path])


def _guards_of_reads(graph: fx.Graph, momenta: Mapping[str, Momentum], captured: Captured) -> Iterator[Guard]:
    """Yield guards on what a rewritten graph still reads: a module that is called as a whole reads its own."""
    if not any(captured.guards.values()):
        return
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    read.update(target for call in momenta.values() for step in call.graphs.steps for target in step.targets)
    for path, guards in captured.guards.items():
        if any(paths.is_inside(target, path) for target in read):
            yield from guards


def make_momentum(graphs: ChainGraphs, options: Options) -> Momentum:
    """Return the module that runs a chain by the options."""
    velocity = options.velocity_of(graphs.name)
    settings = ChainSettings(
        gamma=options.gamma_of(graphs.name, sum(graphs.updates)),
        arithmetic=ARITHMETICS[options.arithmetic],
        velocity=velocity if isinstance(velocity, str) else "module",
        verify=options.verify,
        offload=options.offload is not None,
        plan=ChainPlan.keep_all(len(graphs.steps)) if options.budget.share == 1.0 else None,
    )
    momentum = Momentum(graphs, settings)
    if options.plans or (momentum.nests and options.budget.share != 1.0):
        momentum.plans = NetPlans(options.budget)
    return momentum
