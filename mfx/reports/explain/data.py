"""The steps, chains and memory of an explanation, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from mfx.reports.explain.advice import advise_on_weights
from mfx.reports.explain.storage import ExplainedStorage


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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "path": self.path,
            "kind": self.kind,
            "branch": [node.name for node in self.nodes],
            "captures": list(self.captures),
            "sides": list(self.sides),
            "source": self.source,
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
        gamma: the momentum as it is represented.
        arithmetic: ``"exact"`` or ``"float"``.
        weights: how much each step's branch counts in the end, relative to the model at γ = 0.
        storage: the part of the stream kept for the backward pass, and the reason; None if shapes are not known.
        memory: memory with mfx and without; None if nothing could be predicted.
    """

    name: str
    steps: tuple[ExplainedStep, ...]
    gamma: float
    arithmetic: str
    weights: tuple[float, ...]
    storage: ExplainedStorage | None = None
    memory: ChainMemory | None = None

    @property
    def kind(self) -> str:
        """The kinds of its steps."""
        return "+".join(sorted({step.kind for step in self.steps}))

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
            "advice": self.advice,
            "storage": None if self.storage is None else self.storage.to_dict(),
            "memory": None if self.memory is None else asdict(self.memory),
            "steps": [step.to_dict() for step in self.steps],
        }
