"""The contents of an explanation, section by section, as rows of text."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mfx.reports.explain.data import ExplainedChain
from mfx.reports.explain.estimate import Estimate
from mfx.reports.table import Table
from mfx.text import amount, count, listed, ratio, size
from mfx_passes import Cut, Rejection

_CHAINS = ("chain", "steps", "kind", "gamma", "arithmetic", "weights of the branches", "state")
_MEMORY = ("alive between forward and backward", "plain", "mfx", "", "recomputed")
_STEPS = ("step", "weight", "also reads", "source")

Rows = list[tuple[str, ...]]
BLOCKS = "in no chain and unchanged, but recomputed in the backward pass, unless a budget keeps their activations"


@dataclass(frozen=True)
class RejectedGroup:
    """Residual adds that stay as they are for the same reason."""

    reason: str
    remedy: str
    rejections: tuple[Rejection, ...]

    @property
    def places(self) -> list[str]:
        """Node, path and source of each, as a line of text."""
        return places(self.rejections)


@dataclass(frozen=True)
class Contents:
    """The contents of an explanation, for a terminal or a notebook to lay out.

    Attributes:
        verdict: a summary in one line.
        chains: one row per chain.
        sources: name of each chain, and the places of its steps.
        steps: name of each chain, and a table with one row per step.
        memory: what a training step takes.
        unpredicted: reason why memory could not be predicted although there were inputs.
        policies: name of each chain with known shapes, and what it keeps of its stream.
        advice: advice, one line each.
        rejections: residual steps that stay as they are, by reason.
        blocks: paths of modules in no chain that run again in the backward pass.
        cuts: residual adds that cannot go on with the chain before them, and why.
        others: sums that stay as they are and only look like residual steps, by reason.
        unheard: paths of modules whose hooks do not run.
        leaves: modules that are called as a whole because a trace cannot follow them, and why.
        conditions: lines that decide on the values of tensors.
        breaks: lines that keep a call from being one graph, with what each costs.
    """

    verdict: str
    chains: Table
    signs: str
    sources: Rows
    steps: list[tuple[str, Table]]
    memory: Table
    unpredicted: str
    policies: Rows
    advice: tuple[str, ...]
    rejections: list[RejectedGroup]
    blocks: tuple[str, ...]
    cuts: tuple[str, ...]
    others: list[RejectedGroup]
    unheard: tuple[str, ...]
    leaves: Rows
    conditions: tuple[str, ...]
    breaks: tuple[str, ...]


def verdict(model: str, chains: Sequence[ExplainedChain], left: Sequence[Rejection], estimate: Estimate | None) -> str:
    """Return a summary in one line: residual steps rewritten and in all, and what a training step keeps."""
    steps = sum(len(chain.steps) for chain in chains)
    if not chains:
        return f"{model}: no chain of residual steps, {count(len(left), 'residual step')} left alone"
    found = f"{model}: {steps} of {count(steps + len(left), 'residual step')} in {count(len(chains), 'chain')}"
    if estimate is None:
        return found
    return f"{found}: {size(estimate.momentum.kept)} kept instead of {size(estimate.plain.kept)}"


def chain_table(chains: Iterable[ExplainedChain]) -> Table:
    """Return a table with one row per chain."""
    rows = [
        (
            indented(chain),
            _steps(chain),
            chain.kind,
            chain.shown_gamma,
            chain.arithmetic,
            weights(chain.weights, chain.spread),
            state(chain),
        )
        for chain in chains
    ]
    return Table(_CHAINS, rows)


def signs(chains: Iterable[ExplainedChain]) -> str:
    """Return what the ± of a chain's γ and weights mean; empty if there is none."""
    if not any(chain.spread for chain in chains):
        return ""
    return (
        "±: the sign of gamma is drawn in training, so gamma has mean 0 and each branch counts 1 in the mean, give or "
        "take the standard deviation behind its ±; in evaluation this is the model itself"
    )


def indented(chain: ExplainedChain) -> str:
    """Return a chain's name, indented if it lies in others."""
    return f"{'  ' * (chain.depth - 1)}└ {chain.name}" if chain.depth else chain.name


def _steps(chain: ExplainedChain) -> str:
    """Return the number of steps; with several streams, of updates of each, too."""
    if len(chain.streams) == 1:
        return str(len(chain.steps))
    counts = Counter(update.stream for update in chain.updates)
    return f"{len(chain.steps)}: {', '.join(f'{counts[name]} of {name}' for name in chain.streams)}"


def memory_table(chains: Sequence[ExplainedChain], estimate: Estimate | None) -> Table:
    """Return what a training step takes: by chain, which adds up with what lies around to all of it, then the peak."""
    if estimate is None:
        return Table(_MEMORY, ())
    plain, momentum = estimate.plain, estimate.momentum
    rows = [
        _bytes(indented(chain), chain.memory.plain, chain.memory.kept, amount(chain.memory.recomputed, "FLOP"))
        for chain in chains
        if chain.memory is not None
    ]
    outermost = [chain.memory for chain in chains if chain.memory is not None and not chain.depth]
    around = plain.kept - sum(m.plain for m in outermost), momentum.kept - sum(m.kept for m in outermost)
    again = momentum.recomputed.get("")
    rows += [_bytes("around the chains", *around, amount(again, "FLOP") if again else "")] if rows else []
    extra = momentum.flops - plain.flops
    share = f" (+{extra / plain.flops:.0%})" if plain.flops else ""
    rows.append(_bytes("all of the model", plain.kept, momentum.kept, f"{amount(extra, 'FLOP')}{share}"))
    rows.append(_bytes("peak, the output held", plain.peak, momentum.peak, ""))
    if (plain.peak_of_loss, momentum.peak_of_loss) != (plain.peak, momentum.peak):
        rows.append(_bytes("peak, only the loss held", plain.peak_of_loss, momentum.peak_of_loss, ""))
    room = round(estimate.room.total)
    rows.append(_bytes("parameters, gradients, Adam's state", room, room, ""))
    rows.append(_bytes("all of that, at the peak", plain.peak + room, momentum.peak + room, ""))
    return Table(_MEMORY, rows, numbers=4)


def policies(chains: Iterable[ExplainedChain]) -> Rows:
    """Return what each chain with known shapes keeps of its stream, and why."""
    rows: Rows = []
    for chain in chains:
        if (storage := chain.storage) is not None:
            error = f"; relative error in a rebuilt state {storage.error:.0e}" if storage.error else ""
            rows.append((chain.name, f"{storage.policy} ({storage.reason}{error})"))
    return rows


def sources(chain: ExplainedChain) -> str:
    """Return where the steps of a chain lie, first and last, and the lines that add them up."""
    paths = [step.path or "the model" for step in chain.steps]
    lines = list(dict.fromkeys(short_place(step.source) for step in chain.steps if step.source))
    more = f" and {len(lines) - 2} more" if len(lines) > 2 else ""
    where = f" ({', '.join(lines[:2])}{more})" if lines else ""
    return f"{' … '.join(dict.fromkeys((paths[0], paths[-1])))}{where}"


def step_table(chain: ExplainedChain) -> Table:
    """Return a table with one row per step of a chain; the updates of several streams stand side by side."""
    weights = iter(_numbers(chain.weights, chain.spread, digits=3))
    rows = [
        (
            step.path if len(chain.streams) == 1 else f"{step.path} ({', '.join(u.stream for u in step.updates)})",
            ", ".join(next(weights) for _ in step.updates),
            ", ".join(step.captures),
            short_place(step.source),
        )
        for step in chain.steps
    ]
    return Table(_STEPS, rows)


def short_place(source: str) -> str:
    """Return ``file:line`` without the path to the installed packages or to the working directory.

    >>> short_place("/usr/lib/python3/site-packages/timm/models/vit.py:7")
    'timm/models/vit.py:7'
    """
    return source.rpartition("site-packages/")[2].removeprefix(f"{os.getcwd()}{os.sep}")


def groups(rejections: Iterable[Rejection]) -> list[RejectedGroup]:
    """Group rejections by reason and remedy."""
    found: dict[tuple[str, str], list[Rejection]] = defaultdict(list)
    for rejection in rejections:
        found[rejection.reason, rejection.remedy].append(rejection)
    return [RejectedGroup(*why, tuple(alike)) for why, alike in found.items()]


def places(notes: Iterable[Rejection | Cut]) -> list[str]:
    """Return node, path and source of each, as a line of text."""
    found = [(note.node.name, ", ".join(filter(None, (note.path, short_place(note.source))))) for note in notes]
    return [f"{name} ({place})" if place else name for name, place in found]


def leaves(reasons: Mapping[str, str]) -> Rows:
    """Return the modules that are called as a whole, those with the same reason together, and why."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, why in reasons.items():
        found[why].append(path)
    return [(listed(places), short_place(why)) for why, places in found.items()]


def _bytes(name: str, plain: int, kept: int, recomputed: str) -> tuple[str, ...]:
    return name, size(plain), size(kept), ratio(kept, plain), recomputed


def weights(values: Sequence[float], spread: Sequence[float] = ()) -> str:
    """Return weights, and their spread if they have one, as text, only the first and last ones if there are many."""
    numbers = _numbers(values, spread, digits=2)
    return " ".join(numbers if len(numbers) <= 4 else [*numbers[:2], "...", *numbers[-2:]])


def _numbers(values: Sequence[float], spread: Sequence[float], *, digits: int) -> list[str]:
    deviations = [f"±{deviation:.{digits}f}" for deviation in spread] or [""] * len(values)
    return [f"{value:.{digits}f}{deviation}" for value, deviation in zip(values, deviations, strict=True)]


def state(chain: ExplainedChain) -> str:
    """Return the shape and dtype of a chain's streams; ``""`` if they are not known."""
    if chain.storage is None:
        return ""
    shapes = [f"{'×'.join(map(str, s.shape))} {str(s.dtype).removeprefix('torch.')}" for s in chain.storage.streams]
    return " + ".join(shapes)
