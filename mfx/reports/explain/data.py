"""The steps, chains and memory of an explanation, as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from mfx.reports.explain.advice import PRETRAINED, TOO_SHORT, advise_on_weights
from mfx.reports.explain.storage import ExplainedStorage
from mfx.text import listed


@dataclass(frozen=True)
class ExplainedUpdate:
    """An update of one stream in a step.

    Attributes:
        stream: name of the stream.
        path: longest common module path of its branch.
        kind: as that of a step.
        source: ``file:line`` of the sum.
    """

    stream: str
    path: str
    kind: str
    source: str


@dataclass(frozen=True, eq=False)
class ExplainedStep:
    """A step of a chain, explained.

    Attributes:
        path: longest common module path of its branch.
        kind: ``"residual"``: x + f(x); ``"map"``: h(x), of which f = h(x) - x is taken (an activation or a
            normalisation follows the sum).
        branch: the graph of f, or of h.
        captures: names of the other values that it reads.
        sides: names of values inside it that other nodes read.
        source: ``file:line`` of the sum, of the first one if there are several.
        reads: names of the streams that it reads.
        updates: of the streams that it moves on.
    """

    path: str
    kind: str
    branch: fx.Graph
    captures: tuple[str, ...]
    sides: tuple[str, ...]
    source: str
    reads: tuple[str, ...] = ("x",)
    updates: tuple[ExplainedUpdate, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes of the branch."""
        return tuple(node for node in self.branch.nodes if node.op not in ("placeholder", "output"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "path": self.path,
            "kind": self.kind,
            "branch": [node.name for node in self.nodes],
            "captures": list(self.captures),
            "sides": list(self.sides),
            "source": self.source,
            "reads": list(self.reads),
            "updates": [asdict(update) for update in self.updates],
        }


@dataclass(frozen=True)
class ChainMemory:
    """The predicted memory and work of a chain's calls in one training step.

    Attributes:
        plain: bytes allocated in the chain and alive between forward and backward, with ordinary
            backpropagation through the original model.
        kept: the same bytes, as mfx runs the chain.
        recomputed: floating-point operations that the recomputation of its branches takes.
    """

    plain: int
    kept: int
    recomputed: int


@dataclass(frozen=True, eq=False)
class ExplainedChain:
    """A chain, explained.

    Attributes:
        name: longest common module path of its steps.
        steps: first to last.
        gamma: the momentum as it is represented, the magnitude if it has random signs.
        arithmetic: ``"exact"`` or ``"float"``.
        weights: how much the branch of each update counts in the end, relative to the model at γ = 0.
        storage: the part of the stream kept for the backward pass, and the reason; None if shapes are not known.
        memory: memory with mfx and without; None if nothing could be predicted.
        streams: names of the streams.
        depth: number of chains around it: those that it lies in a branch of.
        spread: where γ has random signs, the standard deviations of the weights, whose means are 1; else empty.
    """

    name: str
    steps: tuple[ExplainedStep, ...]
    gamma: float
    arithmetic: str
    weights: tuple[float, ...]
    storage: ExplainedStorage | None = None
    memory: ChainMemory | None = None
    streams: tuple[str, ...] = ("x",)
    depth: int = 0
    spread: tuple[float, ...] = ()

    @property
    def shown_gamma(self) -> str:
        """γ as reports show it: ±0.25 with random signs."""
        return f"{'±' if self.spread else ''}{self.gamma:g}"

    @property
    def updates(self) -> tuple[ExplainedUpdate, ...]:
        """The updates of all steps; a step of one stream is one update."""
        return tuple(update for step in self.steps for update in step.updates)

    @property
    def kind(self) -> str:
        """The kinds of its steps."""
        return "+".join(sorted({update.kind for update in self.updates}))

    @property
    def advice(self) -> str:
        """Advice about small weights; ``""`` if there are none."""
        return advise_on_weights(self.weights, self.gamma)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "gamma": self.gamma,
            "arithmetic": self.arithmetic,
            "weights": list(self.weights),
            "spread": list(self.spread),
            "advice": self.advice,
            "storage": None if self.storage is None else self.storage.to_dict(),
            "memory": None if self.memory is None else asdict(self.memory),
            "streams": list(self.streams),
            "depth": self.depth,
            "steps": [step.to_dict() for step in self.steps],
        }


def advise_on_gammas(chains: Sequence[ExplainedChain]) -> list[str]:
    """Return advice on γ, the same for several chains once."""
    about: dict[str, list[str]] = defaultdict(list)
    for chain in chains:
        if chain.gamma and chain.storage is not None and chain.storage.policy == "inputs":
            about[TOO_SHORT].append(chain.name)
    for chain in chains:
        if chain.advice:
            about[chain.advice].append(chain.name)
    has_small = any(chain.advice for chain in chains)
    return [*(f"{listed(names)}: {advice}" for advice, names in about.items()), *([PRETRAINED] if has_small else [])]
