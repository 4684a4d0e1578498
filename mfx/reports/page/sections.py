"""The sections of the page."""

from __future__ import annotations

from mfx.reports.explain.data import ExplainedChain
from mfx.reports.explain.explanation import Explanation
from mfx.reports.explain.tables import BLOCKS, RejectedGroup, indented, state, weights
from mfx.reports.markup import Markup, element, joined
from mfx.reports.page.memory_lines import legend, lines
from mfx.reports.profile.result import Profile, measures, notes_of
from mfx.reports.table import Table
from mfx.text import amount, count, ratio, size
from mfx_passes import Rejection

_PLACES = 40  # shown per reason
_NOTHING = "–"
_CODE = 60_000  # characters of code shown
_UNFOLDED = 40  # lines of code that are shown without unfolding


def summary(found: Explanation, profile: Profile | None) -> Markup:
    """Return the chains, refusals and effects as a few numbers: measured ones, else predicted ones."""
    chains, left = len(found.chains), len(found.left_steps)
    cards = [
        _card(str(chains), count(chains, "momentum chain").partition(" ")[2]),
        _card(str(sum(len(chain.steps) for chain in found.chains)), "residual steps turned into momentum steps"),
        _card(str(left), f"{count(left, 'residual step').partition(' ')[2]} left alone"),
    ]
    cards += [
        _card(ratio(value, first), f"{what}, relative to plain training")
        for what, value, first in _effects(found, profile)
    ]
    return joined(element("p", found.verdict, class_="verdict"), element("div", *cards, class_="cards"))


def _effects(found: Explanation, profile: Profile | None) -> list[tuple[str, float, float]]:
    """Return what is compared, each with its value with mfx and without."""
    rows = {row.name: row for row in profile.rows} if profile is not None else {}
    if "plain" in rows and "momentum" in rows:
        plain, momentum = rows["plain"], rows["momentum"]
        return [
            ("activations after the forward pass", momentum.kept_bytes, plain.kept_bytes),
            ("peak of activations", momentum.peak_bytes, plain.peak_bytes),
            ("peak with parameters, inputs and gradients", momentum.whole_bytes, plain.whole_bytes),
            ("FLOPs", momentum.flops, plain.flops),
            ("time of a step", momentum.seconds, plain.seconds),
        ]
    if found.estimate is None:
        return []
    predicted, before = found.estimate.momentum, found.estimate.plain
    return [
        ("predicted activations after the forward pass", predicted.kept, before.kept),
        ("predicted peak of activations", predicted.peak, before.peak),
        ("predicted FLOPs", predicted.flops, before.flops),
    ]


def memory(profile: Profile | None, why_not: str) -> Markup:
    """Return the picture of activation memory over time, and the table of measurements."""
    if profile is None:
        return joined(element("h2", "Memory over time"), element("p", f"Not measured: {why_not}", class_="dim"))
    head = ("way to train", "kept", "peak", "whole", "time", "FLOPs")
    first = profile.rows[0]
    body = [(row.name, *map(" · ".join, measures(row, first))) for row in profile.rows]
    notes = notes_of(profile)
    return joined(
        element("h2", "Memory over time"),
        element("figure", lines(profile.rows), legend(profile.rows)),
        element(
            "p",
            f"Bytes of activations alive during one training step on {profile.device}; parameters and their "
            f"gradients do not count. A ring marks the end of the forward pass. Times: median of {profile.repeats}.",
            class_="dim",
        ),
        Table(head, body, numbers=5).page(),
        element("ul", *(element("li", note) for note in notes)) if notes else None,
    )


def chains(found: Explanation) -> Markup:
    """Return a table with one row per chain, the advice, and the text of `mfx.explain`."""
    head = ("chain", "state", "arithmetic", "steps", "γ", "branches count", "plain keeps", "mfx keeps", "recomputes")
    rows = [_chain(chain) for chain in found.chains]
    table = Table(head, rows, numbers=6).page() if rows else element("p", "None.", class_="dim")
    advice = [element("li", advice) for advice in found.advice]
    return joined(
        element("h2", "Chains"),
        table,
        element("p", signs, class_="dim") if (signs := found.contents.signs) else None,
        element("p", "What is kept is kept between forward and backward, predicted.", class_="dim") if rows else None,
        element("p", "What could be done:") if advice else None,
        element("ul", *advice) if advice else None,
        element("details", element("summary", "As mfx.explain prints it"), element("pre", str(found))),
    )


def rejections(found: Explanation) -> Markup:
    """Return the sums that stay as they are, by reason: residual steps, then what only looks like one."""
    blocks = [_group(group) for group in found.contents.rejections]
    others = [_group(group) for group in found.contents.others]
    return joined(
        element("h2", "Left as they are"),
        *(blocks or [element("p", "No residual step was left alone.", class_="dim")]),
        element("p", f"{BLOCKS}: {', '.join(found.blocks)}", class_="dim") if found.blocks else None,
        *([element("p", "Sums that only look like residual steps:", class_="dim"), *others] if others else []),
    )


def code(title: str, text: str) -> Markup:
    """Return code to unfold."""
    if len(text) > _CODE:
        text = f"{text[:_CODE]}\n… and {len(text) - _CODE} characters more"
    is_short = text.count("\n") <= _UNFOLDED
    return element(
        "details", element("summary", title), element("pre", text.strip("\n")), open="open" if is_short else None
    )


def _card(number: str, about: str) -> Markup:
    return element("div", element("b", number), about, class_="card")


def _chain(chain: ExplainedChain) -> tuple[str, ...]:
    storage, memory = chain.storage, chain.memory
    kept = memory.kept if memory is not None else None if storage is None else storage.kept
    policy = "" if storage is None else f" ({storage.policy})"
    return (
        indented(chain) or "the model itself",
        state(chain) or _NOTHING,
        chain.arithmetic,
        str(len(chain.steps)),
        chain.shown_gamma,
        weights(chain.weights, chain.spread).replace("...", "…") or _NOTHING,
        _NOTHING if memory is None else size(memory.plain),
        _NOTHING if kept is None else f"{size(kept)}{policy}",
        _NOTHING if memory is None else amount(memory.recomputed, "FLOP"),
    )


def _group(group: RejectedGroup) -> Markup:
    number = len(group.rejections)
    lines = [element("li", element("code", found.node.name), _place(found)) for found in group.rejections[:_PLACES]]
    return element(
        "details",
        element("summary", f"{number} × {group.reason}"),
        element("p", f"What could be done: {group.remedy}") if group.remedy else None,
        element("ul", *lines, element("li", f"and {number - _PLACES} more") if number > _PLACES else None),
    )


def _place(rejection: Rejection) -> str | None:
    where = ", ".join(filter(None, (rejection.path, rejection.source)))
    return f" in {where}" if where else None
