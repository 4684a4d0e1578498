"""What mfx found in a model, what it left alone and why, and what that takes: as objects and as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from mfx.advice import PRETRAINED, advise_on_output, advise_on_weights, remedy
from mfx.estimate import Estimate
from mfx.explained_storage import ExplainedStorage
from mfx_passes import Rejection

__all__ = ["ChainMemory", "ExplainedChain", "ExplainedStep", "Explanation"]


@dataclass(frozen=True, eq=False)
class ExplainedStep:
    """One step of a chain.

    Attributes:
        path: longest common module path of its branch.
        kind: ``"residual"``: x + f(x); ``"map"``: h(x), of which f = h(x) - x is taken (an activation or a
            normalisation follows the sum).
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

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
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
    """What a chain's calls take in one training step, predicted.

    Attributes:
        plain: bytes that came to be in the chain and are alive between forward and backward, with ordinary
            backpropagation through the original model.
        kept: the same, as mfx runs it.
        recomputed: floating-point operations of the second runs of its branches.
    """

    plain: int
    kept: int
    recomputed: int


@dataclass(frozen=True, eq=False)
class ExplainedChain:
    """One chain.

    Attributes:
        name: longest common module path of its steps.
        steps: first to last.
        gamma: the momentum as it is represented.
        arithmetic: ``"exact"`` or ``"float"``.
        weights: how much each step's branch counts in the end, relative to the model at γ = 0.
        storage: what is kept for the backward pass of the stream, and why; None where the shapes are not known.
        memory: what the chain takes with mfx and without; None where nothing could be predicted.
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
        """The kind of its steps."""
        return "+".join(sorted({step.kind for step in self.steps}))

    @property
    def advice(self) -> str:
        """What to do about small weights; ``""`` where they are not."""
        return advise_on_weights(self.weights, self.gamma)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
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


@dataclass(frozen=True, eq=False)
class Explanation:
    """The chains of a model, the residual adds that are in none, and what a training step takes.

    ``str()`` is at most 100 columns wide; notebooks show tables.

    Attributes:
        model: the name of its class.
        chains: what is, or would be, rewritten.
        rejections: residual adds that stay as they are, with reasons.
        graphs: the rewritten graphs.
        flat: modules whose own ``forward`` and hooks do not run, because their operations belong to several steps.
        estimate: what a training step takes with mfx and without, predicted; None without inputs.
        unpredicted: why there is no ``estimate`` although there were inputs.
    """

    model: str
    chains: tuple[ExplainedChain, ...]
    rejections: tuple[Rejection, ...]
    graphs: Mapping[str, fx.GraphModule]
    flat: tuple[str, ...]
    estimate: Estimate | None = None
    unpredicted: str = ""

    @property
    def advice(self) -> tuple[str, ...]:
        """What could be done about chains and outputs; what could be done about rejections is said with these."""
        advice = [f"{chain.name}: {chain.advice}" for chain in self.chains if chain.advice]
        advice += [PRETRAINED] if advice else []
        return (*advice, *(() if self.estimate is None else advise_on_output(self.estimate.held)))

    def __str__(self) -> str:
        from mfx.explained_text import text

        return text(self)

    def _repr_html_(self) -> str:
        from mfx.explained_page import page

        return page(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graphs, as plain data, which ``json.dumps`` takes.

        Returns:
            ``model``; ``chains``, each with ``name``, ``gamma``, ``arithmetic``, ``weights``, ``advice``, ``storage``
            (the attributes of `ExplainedStorage`, and ``kept``), ``memory`` (``plain`` and ``kept`` in bytes,
            ``recomputed`` in FLOP) and ``steps`` (``path``, ``kind``, ``branch``, ``captures``, ``sides``, ``source``);
            ``rejections``, each with ``node``, ``path``, ``source``, ``reason`` and ``remedy``; ``flat``; ``totals``:
            ``plain`` and ``momentum``, each with ``kept`` and ``peak`` in bytes and ``flops``; ``held``: bytes by key
            of the output; ``advice``; ``unpredicted``. ``storage``, ``memory`` and ``totals`` are None where unknown.
        """
        return {
            "model": self.model,
            "chains": [chain.to_dict() for chain in self.chains],
            "rejections": [
                {
                    "node": rejection.node.name,
                    "path": rejection.path,
                    "source": rejection.source,
                    "reason": rejection.reason,
                    "remedy": remedy(rejection.reason),
                }
                for rejection in self.rejections
            ],
            "flat": list(self.flat),
            "totals": self._totals(),
            "held": {} if self.estimate is None else dict(self.estimate.held),
            "advice": list(self.advice),
            "unpredicted": self.unpredicted,
        }

    def _totals(self) -> dict[str, Any] | None:
        if self.estimate is None:
            return None
        both = {"plain": self.estimate.plain, "momentum": self.estimate.momentum}
        return {name: {"kept": use.kept, "peak": use.peak, "flops": use.flops} for name, use in both.items()}
