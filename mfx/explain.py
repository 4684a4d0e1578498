"""What mfx found in a model, what it left alone and why."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfx_passes import MfxError, Rejection
from mfx_passes.ir import source_line
from torch import fx, nn

from mfx.momentum import Momentum
from mfx.net import RewrittenForward, forward_of
from mfx.options import check_options
from mfx.tree import tree_copy


@dataclass(frozen=True, eq=False)
class ExplainedStep:
    """One step of a chain.

    Attributes:
        path: longest common module path of its branch.
        kind: ``"residual"``: x + f(x); ``"map"``: h(x), of which f = h(x) - x is taken (an activation or a normalisation
            follows the sum).
        branch: the graph of f, or of h.
        captures: what else it reads, by name.
        sides: values inside it that others read, by name.
        source: ``file:line`` of the sum.
    """

    path: str
    kind: str
    branch: fx.Graph
    captures: tuple[str, ...]
    sides: tuple[str, ...]
    source: str

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes of the branch."""
        return tuple(node for node in self.branch.nodes if node.op not in ("placeholder", "output"))


@dataclass(frozen=True, eq=False)
class ExplainedChain:
    """One chain.

    Attributes:
        name: longest common module path of its steps.
        steps: first to last.
        gamma: the momentum as it is represented.
        arithmetic: ``"exact"`` or ``"float"``.
        weights: how much each step's branch counts in the end, relative to the model at γ = 0.
    """

    name: str
    steps: tuple[ExplainedStep, ...]
    gamma: float
    arithmetic: str
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Explanation:
    """The chains of a model, and the residual adds that are in none.

    Attributes:
        model: the name of its class.
        chains: what is, or would be, rewritten.
        rejections: residual adds that stay as they are, with reasons.
        graphs: the rewritten graphs.
        flat: modules whose own ``forward`` and hooks do not run, because their operations belong to several steps.
    """

    model: str
    chains: tuple[ExplainedChain, ...]
    rejections: tuple[Rejection, ...]
    graphs: Mapping[str, fx.GraphModule]
    flat: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self._headline(), *self._chain_lines(), *self._rejection_lines(), *self._flat_lines()])

    def _headline(self) -> str:
        steps = sum(len(chain.steps) for chain in self.chains)
        return (
            f"{self.model}: {_count(len(self.chains), 'chain')} of {_count(steps, 'step')}, "
            f"{_count(len(self.rejections), 'residual add')} left as they are"
        )

    def _chain_lines(self) -> list[str]:
        if not self.chains:
            return []
        rows = [("chain", "steps", "kind", "gamma", "arithmetic", "weights of the branches")]
        for chain in self.chains:
            kinds = "+".join(sorted({step.kind for step in chain.steps}))
            row = (chain.name, str(len(chain.steps)), kinds, f"{chain.gamma:g}", chain.arithmetic, _weights(chain.weights))
            rows.append(row)
        return ["", *_table(rows)]

    def _rejection_lines(self) -> list[str]:
        grouped: dict[str, list[Rejection]] = defaultdict(list)
        for rejection in self.rejections:
            grouped[rejection.reason].append(rejection)
        lines = ["", "left as they are:"] if grouped else []
        for reason, rejections in grouped.items():
            lines.append(f"  {len(rejections)} x {reason}")
            lines += [f"      {rejection.node.name}{_place(rejection)}" for rejection in rejections[:3]]
            lines += [f"      and {len(rejections) - 3} more"] if len(rejections) > 3 else []
        return lines

    def _flat_lines(self) -> list[str]:
        paths = [path for path in self.flat if path]
        if not paths:
            return []
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        return ["", f"hooks on these modules do not run, since they span several steps: {shown}"]

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graphs, as plain data."""
        return {
            "model": self.model,
            "chains": [
                {
                    "name": chain.name,
                    "gamma": chain.gamma,
                    "arithmetic": chain.arithmetic,
                    "weights": list(chain.weights),
                    "steps": [
                        {
                            "path": step.path,
                            "kind": step.kind,
                            "branch": [node.name for node in step.nodes],
                            "captures": list(step.captures),
                            "sides": list(step.sides),
                            "source": step.source,
                        }
                        for step in chain.steps
                    ],
                }
                for chain in self.chains
            ],
            "rejections": [
                {"node": r.node.name, "path": r.path, "source": r.source, "reason": r.reason} for r in self.rejections
            ],
            "flat": list(self.flat),
        }


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Which chains a model has, which residual adds are in none and why.

    Args:
        model: a model, or a net that `mfx.momentumize` returned. For a model: what momentumize would do by default.
        args, kwargs: inputs, as for a call of the model (they are not computed with). With them, shapes are checked too.

    Raises:
        MfxError: the model cannot be captured.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"explain takes a torch.nn.Module, not a {type(model).__name__}.")
    forward = forward_of(model)
    if forward is None:
        forward = RewrittenForward(tree_copy(model), check_options())
    entry = forward.entry_for(*args, **kwargs) if args or kwargs else forward.active or forward.prepare()
    findings = entry.findings(forward.net, forward.options)
    chains = tuple(_explain_chain(call) for call in entry.calls.values())
    return Explanation(
        type(model).__name__,
        tuple(sorted(chains, key=lambda chain: chain.name)),
        tuple(findings.rejections),
        forward.graphs(),
        entry.flat,
    )


def _explain_chain(call: Momentum) -> ExplainedChain:
    steps = tuple(_explain_step(step) for step in call.graphs.steps)
    weights = branch_weights(len(steps), call.gamma.value, residual_start=call.velocity == "residual")
    return ExplainedChain(call.chain, steps, call.gamma.value, call.arithmetic, weights)


def _explain_step(step: Any) -> ExplainedStep:
    inputs = [node.name for node in step.branch.nodes if node.op == "placeholder"]
    (last,) = (node for node in step.original.nodes if node.op == "output")
    return ExplainedStep(
        step.path, step.kind, step.branch, tuple(inputs[1:]), step.sides, source_line(last.args[0][0])
    )


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


def _weights(weights: Sequence[float]) -> str:
    if len(weights) <= 4:
        return " ".join(f"{weight:.2f}" for weight in weights)
    return f"{weights[0]:.2f} {weights[1]:.2f} ... {weights[-2]:.2f} {weights[-1]:.2f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _place(rejection: Rejection) -> str:
    place = ", ".join(filter(None, (rejection.path, rejection.source)))
    return f" ({place})" if place else ""


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
