"""What mfx found in a model, what it left alone and why: as objects, as text, as data."""

from __future__ import annotations

import html
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mfx.explained_storage import ExplainedStorage
from mfx_passes import Rejection

_WIDTH = 120
_HEADER = ("chain", "steps", "kind", "gamma", "arithmetic", "weights of the branches")


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


@dataclass(frozen=True, eq=False)
class ExplainedChain:
    """One chain.

    Attributes:
        name: longest common module path of its steps.
        steps: first to last.
        gamma: the momentum as it is represented.
        arithmetic: ``"exact"`` or ``"float"``.
        weights: how much each step's branch counts in the end, relative to the model at γ = 0.
        storage: what is kept for the backward pass; None where the shapes are not known.
    """

    name: str
    steps: tuple[ExplainedStep, ...]
    gamma: float
    arithmetic: str
    weights: tuple[float, ...]
    storage: ExplainedStorage | None = None


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
        return "\n".join([self._headline(), *self._sections()])

    def _sections(self) -> list[str]:
        return [*self._chain_lines(), *self._storage_lines(), *self._rejection_lines(), *self._flat_lines()]

    def _headline(self) -> str:
        steps = sum(len(chain.steps) for chain in self.chains)
        return (
            f"{self.model}: {_count(len(self.chains), 'chain')} of {_count(steps, 'step')}, "
            f"{_count(len(self.rejections), 'residual add')} left as they are"
        )

    def _chain_lines(self) -> list[str]:
        if not self.chains:
            return []
        return ["", *_table([_HEADER, *(_row(chain) for chain in self.chains)])]

    def _storage_lines(self) -> list[str]:
        known = [(chain, chain.storage) for chain in self.chains if chain.storage is not None]
        lines = ["", "kept between forward and backward:"] if known else []
        for chain, storage in known:
            error = f"; relative error in a rebuilt state {storage.error:.0e}" if storage.error else ""
            lines += _wrapped(f"  {_fit(chain.name, 44)}: {storage.policy} ({storage.reason}{error})")
        return lines

    def _rejection_lines(self) -> list[str]:
        grouped: dict[str, list[Rejection]] = defaultdict(list)
        for rejection in self.rejections:
            grouped[rejection.reason].append(rejection)
        lines = ["", "left as they are:"] if grouped else []
        for reason, rejections in grouped.items():
            lines += _wrapped(f"  {len(rejections)} x {reason}")
            lines += [_fit(f"      {rejection.node.name}{_place(rejection)}", _WIDTH) for rejection in rejections[:3]]
            lines += [f"      and {len(rejections) - 3} more"] if len(rejections) > 3 else []
        return lines

    def _flat_lines(self) -> list[str]:
        paths = [_fit(path, 60) for path in self.flat if path]
        if not paths:
            return []
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        return ["", *_wrapped(f"hooks on these modules do not run, since sums in them are part of a chain: {shown}")]

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
                    "storage": None if chain.storage is None else chain.storage.to_dict(),
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


def _row(chain: ExplainedChain) -> tuple[str, ...]:
    kinds = "+".join(sorted({step.kind for step in chain.steps}))
    steps, gamma = str(len(chain.steps)), f"{chain.gamma:g}"
    return _fit(chain.name, 44), steps, kinds, gamma, chain.arithmetic, _weights(chain.weights)


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


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _fit(text: str, width: int) -> str:
    """Cut out of the middle what is too much: the ends of paths tell most."""
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[: width - 1 - half]}…{text[-half:]}"
