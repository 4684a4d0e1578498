"""Models to graphs, graphs to text, and rewritten graphs run by the plain recurrence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx.capture.arguments import bind_defaults
from mfx.capture.captured import signature_of
from mfx.capture.symbolic.trace import capture
from mfx_passes import ChainGraphs, ModuleCall, Rewritten, Selection, StepGraphs, rewrite_graph

ANY = Selection()


@dataclass
class Traced:
    """A model's graph as the tracer recorded it."""

    model: nn.Module
    graph: fx.Graph
    calls: list[ModuleCall]

    @property
    def modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.graph.nodes if node.name == name)


def traced(model: nn.Module, inputs: Sequence[Tensor] = ()) -> Traced:
    """Trace a model; with inputs, every node knows its value's shape and dtype."""
    captured = capture(model, bind_defaults(signature_of(model)))
    graph, calls = captured.copy()
    if inputs:
        _Values(model, graph=graph).run(*inputs)
    return Traced(model, graph, calls)


class _Values(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value.detach().clone() if isinstance(value, Tensor) else value
        return value


@dataclass
class Result:
    """A rewritten graph and what was put into it."""

    model: nn.Module
    graph: fx.Graph
    chains: list[ChainGraphs]
    rewritten: Rewritten

    @property
    def reasons(self) -> dict[str, str]:
        return {rejection.node.name: rejection.reason for rejection in self.rewritten.findings.rejections}

    def run(self, *inputs: Tensor, gamma: float) -> Any:
        """Run the graph, its chains by the plain recurrence."""
        root = nn.Module()
        root.__dict__.update(self.model.__dict__)
        calls = {f"momentum{i}": PlainRecurrence(graphs, gamma) for i, graphs in enumerate(self.chains)}
        root._modules = {**self.model._modules, **calls}
        return fx.GraphModule(root, self.graph)(*inputs)


def rewritten(case: Traced, selection: Selection = ANY, velocity: str | None = None) -> Result:
    chains: list[ChainGraphs] = []

    def insert(graphs: ChainGraphs) -> tuple[str, str | None]:
        chains.append(graphs)
        return f"momentum{len(chains) - 1}", velocity

    done = rewrite_graph(case.graph, case.modules, insert, selection, case.calls)
    return Result(case.model, case.graph, chains, done)


def rewrite_model(model: nn.Module, *inputs: Tensor, selection: Selection = ANY) -> Result:
    return rewritten(traced(model, inputs), selection)


class PlainRecurrence(nn.Module):
    """Runs a chain's graphs by v ← γ·v + (1−γ)·f(x), x ← x + v; at γ = 0 its steps as they were."""

    def __init__(self, graphs: ChainGraphs, gamma: float) -> None:
        super().__init__()
        self.graphs = graphs
        self.gamma = gamma

    def forward(self, xs: Sequence[Tensor], captures: Sequence[Any], roots: Mapping[str, Any], *v0: Any) -> Any:
        root = nn.Module()
        root.__dict__.update({k: value for k, value in roots.items() if not isinstance(value, nn.Module)})
        root.__dict__["_modules"] = {k: value for k, value in roots.items() if isinstance(value, nn.Module)}
        available, states = list(captures), [list(xs)]
        vs = list(v0) if v0 else [torch.zeros_like(x) for x in xs]
        for step in self.graphs.steps:
            before, after = states[-1], list(states[-1])
            given = [*(before[s] for s in step.reads), *(available[i] for i in step.captures)]
            values = run(step.original if self.gamma == 0 else step.branch, root, *given)
            for s, kind, value in zip(step.writes, step.kinds, values, strict=False):
                if self.gamma:
                    f = value - before[s] if kind == "map" else value
                    vs[s] = self.gamma * vs[s] + (1 - self.gamma) * f
                after[s] = before[s] + vs[s] if self.gamma else value
            states.append(after)
            available += values[len(step.writes) :]
        taps = [states[t][s] for t, s in self.graphs.taps]
        outputs = (*states[-1], *taps, *available[len(captures) :])
        return outputs if len(outputs) > 1 else outputs[0]


def run(graph: fx.Graph, root: nn.Module, *args: Any) -> Any:
    return fx.Interpreter(root, garbage_collect_values=False, graph=graph).run(*args)


# --- text ------------------------------------------------------------------------------------------------------------


def code_of(graph: fx.Graph) -> str:
    """A graph as Python, without what it says about the lifetime of values."""
    source = graph.python_code("self").src
    source = re.sub(r" -> \w+:", ":", source)  # the annotations of the user's forward, which a tracer may keep or not
    return re.sub(r";\s+(\w+ = )+None", "", source).replace("    ", "  ").strip() + "\n"


def describe(model: nn.Module, inputs: Sequence[Tensor] = (), selection: Selection = ANY) -> str:
    """Everything the passes make of a model: the text of a golden file."""
    before = code_of(traced(model).graph)
    result = rewritten(traced(model, inputs), selection)
    after = code_of(result.graph)
    lines = ["=== before", before, "=== after", after if after != before else "the same\n"]
    for i, graphs in enumerate(result.chains):
        lines.append(f"=== momentum{i} = chain {graphs.name}, taps {_taps(graphs)}\n")
        lines += [_describe_step(t, step) for t, step in enumerate(graphs.steps)]
    flat = ", ".join(sorted(call.target for call in result.rewritten.flat))
    lines += [f"=== not callable as modules any more: {flat}\n"] * bool(flat)
    cuts = [f"{cut.node.name}: {cut.reason}\n" for cut in result.rewritten.findings.cuts]
    lines += ["=== cuts\n"] * bool(cuts) + cuts
    lines += ["=== rejections\n"] * bool(result.reasons)
    lines += [f"{name}: {reason}" for name, reason in result.reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def _taps(graphs: ChainGraphs) -> list[Any]:
    return [t if len(graphs.streams) == 1 else (t, graphs.streams[s]) for t, s in graphs.taps]


def _describe_step(t: int, step: StepGraphs) -> str:
    streams = "" if step.reads == step.writes == (0,) else f", streams {list(step.reads)} to {list(step.writes)}"
    read = f"captures {list(step.captures)}, sides {list(step.sides)}"
    head = f"--- step {t}: {step.path or 'root'}, {step.kind}{streams}, {read}"
    parts = [head, "branch:", code_of(step.branch)]
    if step.original is not step.branch:
        parts += ["original:", code_of(step.original)]
    return "\n".join(parts)
