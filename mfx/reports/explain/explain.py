"""Explains which chains a model has, which residual adds are in none and why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mfx.compat import compiled_model, hook_tables
from mfx.compat.pipelining import Stage, stage_of
from mfx.net.views import View, breaks_of, views_of, written
from mfx.program.chain_call import Momentum
from mfx.progress import waiting_for
from mfx.reports.explain.advice import OPTIONAL_OUTPUTS
from mfx.reports.explain.data import ChainMemory, ExplainedChain, ExplainedStep, ExplainedUpdate
from mfx.reports.explain.estimate import Estimate, estimate
from mfx.reports.explain.explanation import Explanation
from mfx.reports.explain.residual_steps import is_residual_step
from mfx.reports.explain.stages import borders
from mfx.reports.explain.storage import explain_storage
from mfx.text import described
from mfx_passes import ChainGraphs, Findings, MfxError, StepGraphs
from mfx_passes.ir import source_line
from mfx_passes.paths import join

_NOT_REHEARSED = "compiled graphs are not rehearsed; mfx.explain the model that was compiled"
_NOT_ONE_GRAPH = "the model cannot be captured as one graph, so its modules are rewritten each on its own"


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Explain which chains a model has, and which residual adds are in none and why.

    Args:
        model: a model, or a net that `mfx.momentumize` returned, or ``torch.compile(model, backend="mfx")`` after a
            call, or a `mfx.MomentumNet`, or a ``torch.distributed.pipelining`` stage of one of them, of which the
            chains that its borders cut are said. For a model: what momentumize would do by default.
        *args: inputs, as for a call of the model; they are not computed with, and may be on the meta device, as the
            model may. With inputs, shapes are checked too, and what a training step takes with mfx and without is
            predicted; else only what the chains keep for the backward pass is known, if the net was called before.
        **kwargs: inputs by name.

    Raises:
        MfxError: ``model`` is not a module, or cannot be captured.
        TypeError: its forward takes other arguments.
    """
    if (stage := stage_of(model)) is not None:
        model = stage.module
    if not isinstance(model, nn.Module):
        raise MfxError(f"explain takes a torch.nn.Module, not {described(model)}.")
    views = views_of(model, args, kwargs, "mfx.explain(model, *inputs)")
    name = type(written(model)).__name__
    with waiting_for(f"rehearsing a training step of {name}"):
        predicted, unpredicted = _predict(model, views, args, kwargs) if args or kwargs else (None, "")
    with waiting_for(f"explaining {name}"):
        found = [(view, view.findings()) for view in views]
    chains = {
        (view.path, call_name, len(call.graphs.steps)): (around, _explain_chain(view, call, predicted, len(around) - 1))
        for view in views
        for call_name, around in _nesting(view.calls).items()
        for call in (view.calls[call_name],)
    }  # a chain that several compiled graphs have counts once, and so does a rejection
    rejections = {
        (view.path, str(refused)): (refused, view.module) for view, finds in found for refused in finds.rejections
    }
    cuts = {(view.path, str(cut)): cut for view, finds in found for cut in finds.cuts}
    return Explanation(
        name,
        tuple(chain for _, chain in sorted(chains.values(), key=lambda found: found[0])),
        tuple(refused for refused, _ in rejections.values()),
        tuple(cuts.values()),
        views[0].graphs() if views else {},
        tuple(path for view in views if view.is_whole for path in view.flat),
        predicted,
        unpredicted,
        {path: why for view in views for path, why in view.leaves.items()},
        tuple(dict.fromkeys(condition for view in views for condition in view.conditions)),
        tuple(refused for refused, module in rejections.values() if is_residual_step(refused, module)),
        tuple(join(view.path, path) for view in views for path in _with_hooks(view)),
        breaks_of(model, args, kwargs),
        () if stage is None else tuple(line for view, finds in found for line in _borders(stage, view, finds)),
        tuple(dict.fromkeys(path for view in views for path in view.blocks)),
    )


def _borders(stage: Stage, view: View, found: Findings) -> tuple[str, ...]:
    return borders(stage, found, {call.chain for call in view.calls.values() if call.gamma.is_zero})


def _nesting(calls: Mapping[str, Momentum]) -> dict[str, tuple[str, ...]]:
    """Return of each momentum call the names of the chains around it, outermost first, and its own."""
    outer = {
        str(node.target): name
        for name, call in calls.items()
        for step in call.graphs.steps
        for node in step.branch.nodes
        if node.op == "call_module" and node.target in calls
    }

    def around(name: str) -> tuple[str, ...]:
        return (*(around(outer[name]) if name in outer else ()), calls[name].chain)

    return {name: around(name) for name in calls}


def _with_hooks(view: View) -> list[str]:
    """Return the paths of modules whose hooks do not run, if they have any."""
    walked = dict(view.module.named_modules())
    return [path for path in view.flat if path and path in walked and any(hook_tables(walked[path]))]


def _predict(
    model: nn.Module, views: Sequence[View], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Estimate | None, str]:
    """Return what a training step takes, or why that cannot be said."""
    if not views or not views[0].is_whole:
        return None, _NOT_ONE_GRAPH if compiled_model(model) is None else _NOT_REHEARSED
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a real step gives them
            return estimate(views[0], args, kwargs, tuple(OPTIONAL_OUTPUTS)), ""
    except Exception as error:  # whatever goes wrong on tensors without values may go well on real ones
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _explain_chain(view: View, call: Momentum, found: Estimate | None, depth: int) -> ExplainedChain:
    graphs, gamma, has_signs = call.graphs, call.gamma.value, call.gamma.has_signs
    streams = view.streams.get(call.chain, call.streams)
    residual_start = call.settings.velocity == "residual"
    mean = 0.0 if has_signs else gamma
    weights = _by_update(graphs, [branch_weights(n, mean, residual_start=residual_start) for n in graphs.updates])
    spread = _by_update(graphs, [weights_spread(n, gamma) for n in graphs.updates]) if has_signs else ()
    steps = tuple(_explain_step(step, graphs.streams) for step in graphs.steps)
    storage = explain_storage(call, streams) if streams else None
    memory = None if found is None else _memory(call.chain, found)
    arithmetic = call.settings.arithmetic.name
    return ExplainedChain(call.chain, steps, gamma, arithmetic, weights, storage, memory, graphs.streams, depth, spread)


def _by_update(graphs: ChainGraphs, values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the values of the streams' updates in the order of the chain's."""
    ahead = list(map(iter, values))
    return tuple(next(ahead[stream]) for step in graphs.steps for stream in step.writes)


def _memory(chain: str, found: Estimate) -> ChainMemory:
    return ChainMemory(found.plain.chains[chain], found.momentum.chains[chain], found.momentum.recomputed[chain])


def _explain_step(step: StepGraphs, streams: Sequence[str]) -> ExplainedStep:
    inputs = [node.name for node in step.branch.nodes if node.op == "placeholder"]
    (last,) = (node for node in step.original.nodes if node.op == "output")
    updates = tuple(
        ExplainedUpdate(streams[stream], path, kind, source_line(node))
        for stream, path, kind, node in zip(
            step.writes, step.paths or (step.path,), step.kinds, last.args[0][: len(step.writes)], strict=True
        )
    )
    captures = tuple(inputs[len(step.reads) :])
    reads = tuple(streams[stream] for stream in step.reads)
    return ExplainedStep(step.path, step.kind, step.branch, captures, step.sides, updates[0].source, reads, updates)


def branch_weights(steps: int, gamma: float, *, residual_start: bool = False) -> tuple[float, ...]:
    """Return how much of each branch f_t reaches the end of a chain of T steps: 1 − γ^(T−t), for t = 0 … T − 1.

    From the recurrence v ← γ·v + (1−γ)·f_t, x ← x + v: after step t its share of v decays by γ at every step, and x
    collects (1−γ)·(1 + γ + … + γ^(T−t−1)). If v is f_0 after the first step, that one collects 1 + γ + … + γ^(T−1).

    Args:
        steps: T.
        gamma: γ.
        residual_start: True if the initial velocity is that of the first branch.
    """
    weights = [1 - gamma ** (steps - t) for t in range(steps)]
    if residual_start:
        weights[0] = weights[0] / (1 - gamma)
    return tuple(weights)


def weights_spread(steps: int, magnitude: float) -> tuple[float, ...]:
    """Return the standard deviation of each branch's weight in a chain of T steps, where γ is ±a at random.

    Branch t counts for w = (1 − γ_t)·S, S = 1 + γ_{t+1}·(1 + γ_{t+2}·(1 + …)). Signs are independent, of mean 0, so w
    has mean 1, E(1 − γ_t)² = 1 + a² (1 at the first step, where γ is 0), and E S² = 1 + a² + … + a^(2k) with k steps
    to come.

    Args:
        steps: T.
        magnitude: a.
    """
    square = magnitude**2
    second = (sum(square**i for i in range(steps - t)) * (1 + square * (t > 0)) for t in range(steps))
    return tuple(math.sqrt(max(0.0, moment - 1)) for moment in second)
