"""An explanation: chains, rejections and memory of a model, as objects, as text and as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mfx.reports.explain.advice import advise_on_output
from mfx.reports.explain.data import ExplainedChain, advise_on_gammas
from mfx.reports.explain.estimate import Estimate
from mfx.reports.explain.notebook import page
from mfx.reports.explain.tables import (
    Contents,
    chain_table,
    groups,
    leaves,
    memory_table,
    places,
    policies,
    short_place,
    signs,
    sources,
    step_table,
    verdict,
)
from mfx.reports.explain.terminal import text
from mfx_passes import Cut, Rejection


@dataclass(frozen=True, eq=False)
class Explanation:
    """The chains of a model, the residual adds that are in none, and what a training step takes.

    ``str()`` begins with the verdict and is at most 100 columns wide; notebooks show tables.

    Attributes:
        model: name of the model's class.
        chains: the chains that are, or would be, rewritten.
        rejections: residual adds that stay as they are, with reasons.
        cuts: residual adds that cannot go on with the chain before them, with reasons.
        graphs: the rewritten graphs.
        flat: modules whose own ``forward`` and hooks do not run, because their operations belong to several steps.
        estimate: predicted memory and work of a training step with mfx and without; None without inputs.
        unpredicted: reason why there is no ``estimate`` although there were inputs.
        leaves: modules that are called as a whole because a trace cannot follow them, and why.
        conditions: lines that decide on the values of tensors, with the value that the graph shown here is for: each
            call takes the path of its own values, and each path has a graph.
        left_steps: those of the ``rejections`` that are residual steps of the model; the others only look like one.
        unheard: modules among ``flat`` that have hooks.
        breaks: lines that keep a call from being one graph, with what each costs: at γ > 0 momentum starts anew behind
            such a line.
        borders: chains that the borders of a pipeline's stage cut, with what that costs.
        blocks: modules in no chain that keep their function and run again in the backward pass, each on its own, unless
            a budget keeps their activations.
    """

    model: str
    chains: tuple[ExplainedChain, ...]
    rejections: tuple[Rejection, ...]
    cuts: tuple[Cut, ...]
    graphs: Mapping[str, fx.GraphModule]
    flat: tuple[str, ...]
    estimate: Estimate | None = None
    unpredicted: str = ""
    leaves: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    left_steps: tuple[Rejection, ...] = ()
    unheard: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()
    borders: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The number of residual steps that become momentum steps, and the bytes that a training step keeps."""
        return verdict(self.model, self.chains, self.left_steps, self.estimate)

    @property
    def advice(self) -> tuple[str, ...]:
        """Advice about chains, borders and outputs; a rejection has its own remedy."""
        predicted = self.estimate
        return (
            *(() if predicted is None or predicted.unreachable is None else (predicted.unreachable,)),
            *advise_on_gammas(self.chains),
            *self.borders,
            *(() if predicted is None else advise_on_output(predicted.held)),
        )

    @property
    def contents(self) -> Contents:
        """The explanation as tables and lines of text."""
        chains = self.chains
        return Contents(
            verdict=self.verdict,
            chains=chain_table(chains),
            signs=signs(chains),
            sources=[(chain.name, sources(chain)) for chain in chains],
            steps=[(chain.name, step_table(chain)) for chain in chains],
            memory=memory_table(chains, self.estimate),
            unpredicted=self.unpredicted,
            policies=policies(chains),
            advice=self.advice,
            rejections=groups(self.left_steps),
            blocks=self.blocks,
            cuts=tuple(f"{name}: {cut.reason}" for cut, name in zip(self.cuts, places(self.cuts), strict=True)),
            others=groups(found for found in self.rejections if found not in self.left_steps),
            unheard=self.unheard,
            leaves=leaves(self.leaves),
            conditions=tuple(map(short_place, self.conditions)),
            breaks=tuple(map(short_place, self.breaks)),
        )

    def __str__(self) -> str:
        return text(self.contents)

    def details(self) -> str:
        """Return all of ``str()``, and the sums that stay as they are and only look like residual steps."""
        return text(self.contents, verbose=True)

    def _repr_html_(self) -> str:
        return page(self.contents)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the graphs as plain data, for ``json.dumps``.

        Returns:
            ``model``; ``verdict``; ``chains``, each with ``name``, ``gamma``, ``arithmetic``, ``weights``, ``advice``,
            ``storage`` (the attributes of `ExplainedStorage`, and ``kept``), ``memory`` (``plain`` and ``kept`` bytes,
            ``recomputed`` in FLOP) and ``steps`` (``path``, ``kind``, ``branch``, ``captures``, ``sides``, ``source``);
            ``rejections``, each with ``node``, ``path``, ``source``, ``reason``, ``remedy`` and ``is_step``; ``cuts``,
            each with ``node``, ``path``, ``source`` and ``reason``; ``flat``; ``blocks``;
            ``leaves``: reasons by path; ``conditions``; ``breaks``; ``borders``;
            ``totals``: ``plain`` and ``momentum``, each with ``kept``, ``peak`` (the output held) and ``peak_of_loss``
            (only the loss held) in bytes, and ``flops``; ``room``: bytes of ``parameters`` (with buffers),
            ``gradients``, and of the state of Adam as ``optimizer``; ``held``: bytes by key of the output; ``advice``;
            ``unpredicted``. ``storage``, ``memory``, ``totals`` and ``room`` are None where unknown.
        """
        return {
            "model": self.model,
            "verdict": self.verdict,
            "chains": [chain.to_dict() for chain in self.chains],
            "rejections": [
                {**_noted(rejection), "remedy": rejection.remedy, "is_step": rejection in self.left_steps}
                for rejection in self.rejections
            ],
            "cuts": [_noted(cut) for cut in self.cuts],
            "flat": list(self.flat),
            "blocks": list(self.blocks),
            "leaves": dict(self.leaves),
            "conditions": list(self.conditions),
            "breaks": list(self.breaks),
            "borders": list(self.borders),
            "totals": self._totals(),
            "room": None if self.estimate is None else dataclasses.asdict(self.estimate.room),
            "held": {} if self.estimate is None else dict(self.estimate.held),
            "advice": list(self.advice),
            "unpredicted": self.unpredicted,
        }

    def _totals(self) -> dict[str, Any] | None:
        if self.estimate is None:
            return None
        both = {"plain": self.estimate.plain, "momentum": self.estimate.momentum}
        keys = ("kept", "peak", "peak_of_loss", "flops")
        return {name: {key: getattr(use, key) for key in keys} for name, use in both.items()}


def _noted(note: Rejection | Cut) -> dict[str, str]:
    return {"node": note.node.name, "path": note.path, "source": note.source, "reason": note.reason}
