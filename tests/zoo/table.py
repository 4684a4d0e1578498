"""Rows as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from statistics import median
from string import ascii_lowercase
from typing import Any, TypeAlias

from tests.zoo.row import Row

Cell: TypeAlias = Callable[[Row], Any]

UNSEEN = "it lies in code that runs as written (control flow on values or sizes, random decisions, nested tensors)"


def markdown(rows: Sequence[Row], pending: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page: summary, what the numbers mean, every model, and why sums stay as they were.

    Args:
        rows: in the order of the libraries.
        pending: library and name of models that have no row yet.
    """
    letters = letters_of(rows)
    parts = [
        "# The zoo\n\nModels that other people wrote, as `mfx.momentumize(model)` finds them: no names, no options.\n",
        summary(rows),
        judged(rows),
        EXPLAINED,
        *(_models(library, list(group), letters) for library, group in groupby(rows, attrgetter("library"))),
        _reasons(letters, rows),
        _failures(rows),
        _pending(pending),
    ]
    return "\n".join(filter(None, parts))


# --- summary ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> str:
    """A line per library, and one for all."""
    heads = ["", "models", "captured", "with chains", "identity adds", "rewritten", "in chains of ≥ 2", "rewritten"]
    heads += ["share", "wrong", "failed", "peak, median"]
    groups = [(library, list(group)) for library, group in groupby(rows, attrgetter("library"))]
    if len(groups) > 1:
        groups.append(("all", list(rows)))
    return _table(heads, [_summed(name, group) for name, group in groups])


def _summed(name: str, rows: Sequence[Row]) -> list[Any]:
    peaks = [row.peak for row in rows if row.peak]
    chained = sum(row.chained for row in rows)
    missed = sum(row.missed for row in rows)
    return [
        name,
        len(rows),
        sum(bool(row.capture) for row in rows),
        sum(row.rewritten > 0 for row in rows),
        sum(row.adds for row in rows),
        sum(row.rewritten for row in rows),
        chained,
        chained - missed,
        f"{share(rows):.1%}" if chained else "",
        sum(row.is_wrong for row in rows),
        sum(bool(row.failure) for row in rows),
        f"{median(peaks):.2f}×" if peaks else "",
    ]


def share(rows: Iterable[Row]) -> float:
    """Of the identity residual adds in chains of two or more, how many are rewritten."""
    rows = list(rows)
    return 1 - sum(row.missed for row in rows) / sum(row.chained for row in rows)


def judged(rows: Sequence[Row]) -> str:
    """A line per day of judgement: how many models, and the versions of their packages."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=attrgetter("day")):
        groups.setdefault(row.day, []).append(row)
    lines = [[day, len(group), _versions(group)] for day, group in groups.items()]
    return "\n" + _table(["judged on", "models", "note"], lines)


def _versions(rows: Iterable[Row]) -> str:
    used = {f"{package} {version}" for row in rows for package, version in row.versions.items()}
    return ", ".join(sorted(used))


EXPLAINED = """
Measured by `python -m tests.zoo`, each model on the tree of the day that its row names; one thread of a CPU, float32
where nothing else is said, training mode, random weights, batches of two, models at their own depth and width unless
the note says otherwise. Every model is judged in a process of its own.

* **identity adds**: sums of two tensors of one shape of which one was computed from the other, counted on the autograd
  graph of a forward pass of the original model (`tests/oracles.py`, which knows nothing of mfx). It does not see sums
  in place on a view, and those whose first operand needs no gradient.
* **in chains of ≥ 2**: those that follow another one or are followed by one, on the same graph: the skip of the one is
  the sum of the other, itself or after a relayout, an activation, a normalisation, dropout or a factor. Where a sum is
  the skip of several, a chain goes on with the one that is followed by the most. *share* is how many of these are
  rewritten: a model of which mfx rewrites more than the graph shows in chains counts as all of them, and makes up for
  no other model.
* **rewritten**: sums that became updates of a chain, counted as one forward pass of the momentumized model runs them,
  with the random numbers by which *identity adds* were counted. A step of a chain of several streams has several.
  None where calls with other random numbers are refused, as with layers that are left out at random.
* **verdict**: *equal*: at γ = 0, outputs, gradients, buffers and random state are the original's, bit for bit, and at
  γ = 0.9 all of these are bit for bit those of the same network with `memory_budget=1.0`, which is ordinary
  backpropagation. The others differ at γ = 0 only. *equal, gradients to rounding*: at
  γ = 0, gradients of values that steps capture and that others read were added up in another order. *equal without
  dropout*: chains that take turns in the model run one after the other, and draw their dropout masks in another order
  than the model; with dropout switched off, γ = 0 is the model. *equal to rounding*: the library itself computes
  something in another way while it is compiled. *unchanged*: there is nothing to rewrite, and momentumize returns the
  model itself.
* **kept**, **peak**: bytes of activations of a training step between forward and backward, and at worst, relative to
  the original model's. Images are small, so that whole libraries can be judged; what is outside of the chains (stem,
  head) then counts for more than at full size.
* **capture**: how the graph was found, and the seconds of a processor that the first training step takes longer for it,
  beside other work; rows of earlier days do not have them.
"""


# --- every model ------------------------------------------------------------------------------------------------------


def _models(library: str, rows: Sequence[Row], letters: Mapping[str, str]) -> str:
    columns: Mapping[str, Cell] = {
        "model": attrgetter("model"),
        "note": attrgetter("note"),
        "capture": attrgetter("capture"),
        "identity adds": attrgetter("adds"),
        "in chains of ≥ 2": attrgetter("chained"),
        "rewritten": attrgetter("rewritten"),
        "chains": lambda row: lengths(row.chains),
        "left alone": lambda row: ", ".join(f"{n} ({letters[reason]})" for reason, n in reasons(row).items()),
        "verdict": attrgetter("verdict"),
        "kept": lambda row: f"{row.kept:.2f}×" if row.peak else "",
        "peak": lambda row: f"{row.peak:.2f}×" if row.peak else "",
        "seconds": lambda row: row.captured or "",
        "judged": attrgetter("day"),
    }
    return f"\n## {library}\n\n" + _table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def lengths(chains: Sequence[int]) -> str:
    """Of chains in a row, those of one length together: ``2, 3 (4 times)``."""
    runs = [(length, len(list(run))) for length, run in groupby(chains)]
    return ", ".join(str(length) if times == 1 else f"{length} ({times} times)" for length, times in runs)


# --- why sums stay as they were ---------------------------------------------------------------------------------------


def reasons(row: Row) -> dict[str, int]:
    """Count identity residual adds that stay as they were, by reason; those that no graph shows among them."""
    unseen = max(0, row.adds - row.rewritten - sum(row.refused.values()))
    return {**row.refused, **({UNSEEN: unseen} if unseen else {})}


def letters_of(rows: Iterable[Row]) -> dict[str, str]:
    """A letter for each reason, the most frequent first."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(reasons(row))
    return dict(zip((reason for reason, _ in counts.most_common()), ascii_lowercase, strict=False))


def _reasons(letters: Mapping[str, str], rows: Sequence[Row]) -> str:
    def line(reason: str) -> list[Any]:
        found = [reasons(row)[reason] for row in rows if reason in reasons(row)]
        return [letters[reason], reason, sum(found), len(found)]

    heads = ["", "an identity add stays as it was, because", "adds", "models"]
    return "\n## Left alone, and why\n\n" + _table(heads, map(line, letters))


def _failures(rows: Sequence[Row]) -> str:
    lines = [f"* {row.library}, {row.model}: {row.failure or row.verdict}" for row in rows if not row.is_right]
    return "\n## What went wrong\n\n" + "\n".join(lines) + "\n" if lines else ""


def _pending(keys: Sequence[tuple[str, str]]) -> str:
    lines = [
        f"* {library}: {', '.join(name for _, name in group)}" for library, group in groupby(keys, lambda key: key[0])
    ]
    start = "\n## Not judged yet\n\n`python -m tests.zoo --resume` goes on with:\n\n"
    return start + "\n".join(lines) + "\n" if lines else ""


def _table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    numbers = [
        "---" if head in ("", "model", "note", "capture", "verdict", "judged", "judged on") else "--:" for head in heads
    ]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (heads, numbers, *lines))
