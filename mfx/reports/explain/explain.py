"""Which chains a model has, which residual adds are in none and why."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from mfx.api import graphs
from mfx.capture.captured import CaptureError
from mfx.compat import compiled_model
from mfx.compiler.compiled_graphs import found_for, named_graphs
from mfx.modules.tree_copy import net_of
from mfx.momentumnet.momentum_net import MomentumNet, check_state
from mfx.net.forward import RewrittenForward, forward_of
from mfx.options.options import Options
from mfx.program.chain_call import Momentum, Stream
from mfx.program.rewritten import RewrittenGraph
from mfx.program.shapes import stream_shapes
from mfx.reports.explain.advice import OPTIONAL_OUTPUTS
from mfx.reports.explain.data import ChainMemory, ExplainedChain, ExplainedStep
from mfx.reports.explain.estimate import Estimate, Rehearsal, estimate, of_entry, of_module
from mfx.reports.explain.explanation import Explanation
from mfx.reports.explain.storage import explain_storage
from mfx.text import described
from mfx_passes import Findings, MfxError, Rejection, StepGraphs, find_chains
from mfx_passes.ir import source_line
from mfx_passes.rewrite.portable_graph import copy_graph

_NOT_REHEARSED = "compiled graphs are not rehearsed; mfx.explain the model that was compiled"
_NOT_ONE_GRAPH = "the model cannot be captured as one graph, so its modules are rewritten each on its own"


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Which chains a model has, which residual adds are in none and why.

    Args:
        model: a model, or a net that `mfx.momentumize` returned, or ``torch.compile(model, backend="mfx")`` after a
            call, or a `mfx.MomentumNet`. For a model: what momentumize would do by default.
        *args: inputs, as for a call of the model; they are not computed with, and may be on the meta device, as the
            model may. With inputs, shapes are checked too, and what a training step takes with mfx and without is
            predicted; else only what the chains keep for the backward pass is known, if the net was called before.
        **kwargs: inputs by name.

    Raises:
        MfxError: ``model`` is no module, or cannot be captured.
        TypeError: its forward takes other arguments.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"explain takes a torch.nn.Module, not {described(model)}.")
    compiled = compiled_model(model)
    if compiled is not None:
        if forward_of(compiled) is not None:
            return explain(compiled, *args, **kwargs)
        return _explain_compiled(compiled, _NOT_REHEARSED if args or kwargs else "")
    calls = [module for module in model.modules() if isinstance(module, Momentum)]
    if isinstance(model, fx.GraphModule) and calls:
        return _explain_graph_module(model, calls, args, kwargs)
    if isinstance(model, MomentumNet):
        return _explain_momentum_net(model, args, kwargs)
    forward = forward_of(model)
    if forward is None:
        forward = RewrittenForward(net_of(model), Options())
    if forward.per_module:
        return _explain_parts(type(model).__name__, forward, _NOT_ONE_GRAPH if args or kwargs else "")
    entry = _entry(forward, args, kwargs)
    findings = entry.findings(forward.net, forward.options)
    streams = (
        stream_shapes(forward.net, forward.__signature__, forward.options, entry, args, kwargs)
        if args or kwargs
        else {}
    )
    found = _Found(type(model).__name__, entry.calls.values(), findings, forward.graphs(), entry.flat, streams)
    return found.explained(*_predict(of_entry(forward, entry), args, kwargs))


def _explain_parts(name: str, whole: RewrittenForward, unpredicted: str) -> Explanation:
    """A net that is rewritten module by module: what its last call found in each."""
    chains: list[ExplainedChain] = []
    rejections: list[Rejection] = []
    for part in whole.parts():
        if part.active is not None:
            findings = part.active.findings(part.net, part.options)
            explained = _Found(name, part.active.calls.values(), findings, {}, part.active.flat, {}).explained()
            chains += explained.chains
            rejections += explained.rejections
    chains.sort(key=lambda chain: chain.name)
    return Explanation(name, tuple(chains), tuple(rejections), whole.graphs(), (), unpredicted=unpredicted)


def _explain_compiled(model: nn.Module, unpredicted: str) -> Explanation:
    """What the backend "mfx" found in each graph that TorchDynamo made of a model; a chain in several of them, once."""
    chains: dict[tuple[str, int], ExplainedChain] = {}
    rejections: dict[str, Rejection] = {}
    for graph in found_for(model):
        findings = graph.rewritten.findings(graph.net, graph.options)
        found = _Found("", graph.rewritten.calls.values(), findings, {}, graph.rewritten.flat, {}).explained()
        chains |= {(chain.name, len(chain.steps)): chain for chain in found.chains}
        rejections |= {str(rejection): rejection for rejection in found.rejections}
    ordered = tuple(sorted(chains.values(), key=lambda chain: chain.name))
    every = tuple(rejections.values())
    return Explanation(type(model).__name__, ordered, every, named_graphs(model), (), unpredicted=unpredicted)


def _explain_graph_module(
    module: fx.GraphModule, calls: Iterable[Momentum], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Explanation:
    """A graph module that was rewritten already: its chains are gone from the graph, and lie in the calls."""
    findings = find_chains(copy_graph(module.graph), dict(module.named_modules()))
    found = _Found(type(module).__name__, calls, findings, graphs(module), (), {})
    return found.explained(*_predict(of_module(module), args, kwargs))


def _explain_momentum_net(net: MomentumNet, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Explanation:
    streams = {}
    if args or kwargs:
        x: Any = args[0] if args else kwargs.get("x")
        check_state(x)
        streams[net.chain.chain] = tuple(x.shape), x.dtype
    found = _Found(type(net).__name__, [net.chain], Findings(), {}, (), streams)
    return found.explained(*_predict(of_module(net), args, kwargs))


def _predict(subject: Rehearsal, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Estimate | None, str]:
    """What a training step takes, or why that cannot be said."""
    if not args and not kwargs:
        return None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are a real step's to give
            return estimate(subject, args, kwargs, tuple(OPTIONAL_OUTPUTS)), ""
    except Exception as error:  # whatever goes wrong on tensors without values may go well on real ones
        return None, f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


@dataclass(frozen=True)
class _Found:
    """What is known of a model before anything is predicted."""

    name: str
    calls: Iterable[Momentum]
    findings: Findings
    graphs: Mapping[str, fx.GraphModule]
    flat: tuple[str, ...]
    streams: Mapping[str, Stream]

    def explained(self, found: Estimate | None = None, unpredicted: str = "") -> Explanation:
        chains = [_explain_chain(call, self.streams.get(call.chain, call.stream), found) for call in self.calls]
        chains.sort(key=lambda chain: chain.name)
        rejections = tuple(self.findings.rejections)
        return Explanation(self.name, tuple(chains), rejections, self.graphs, self.flat, found, unpredicted)


def _entry(forward: RewrittenForward, args: Any, kwargs: Any) -> RewrittenGraph:
    """The graph for these inputs, else the one that was run last, else that for default arguments."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mfx: ")  # what they say is in the explanation
        if args or kwargs:
            return forward.entry_for(*args, **kwargs)
        active = forward.active
        if active is not None and active.holds():
            return active
        try:
            return forward.prepare()
        except CaptureError as error:
            raise CaptureError(
                f"With inputs, mfx.explain(model, *inputs), TorchDynamo is asked, too. Without: {error}"
            ) from error


def _explain_chain(call: Momentum, stream: Stream | None, found: Estimate | None) -> ExplainedChain:
    steps = tuple(_explain_step(step) for step in call.graphs.steps)
    weights = branch_weights(len(steps), call.gamma.value, residual_start=call.velocity == "residual")
    storage = None if stream is None else explain_storage(call, *stream)
    memory = None if found is None else _memory(call.chain, found)
    return ExplainedChain(call.chain, steps, call.gamma.value, call.arithmetic, weights, storage, memory)


def _memory(chain: str, found: Estimate) -> ChainMemory:
    return ChainMemory(found.plain.chains[chain], found.momentum.chains[chain], found.momentum.recomputed[chain])


def _explain_step(step: StepGraphs) -> ExplainedStep:
    inputs = [node.name for node in step.branch.nodes if node.op == "placeholder"]
    (last,) = (node for node in step.original.nodes if node.op == "output")
    return ExplainedStep(step.path, step.kind, step.branch, tuple(inputs[1:]), step.sides, source_line(last.args[0][0]))


def branch_weights(steps: int, gamma: float, *, residual_start: bool = False) -> tuple[float, ...]:
    """How much of each branch f_t reaches the end of a chain of T steps: 1 − γ^(T−t), for t = 0 … T − 1.

    From the recurrence v ← γ·v + (1−γ)·f_t, x ← x + v: after step t its share of v decays by γ at every step, and x
    collects (1−γ)·(1 + γ + … + γ^(T−t−1)). If v is f_0 after the first step, that one collects 1 + γ + … + γ^(T−1).

    Args:
        steps: T.
        gamma: γ.
        residual_start: whether the initial velocity is that of the first branch.
    """
    weights = [1 - gamma ** (steps - t) for t in range(steps)]
    if residual_start:
        weights[0] = weights[0] / (1 - gamma)
    return tuple(weights)
