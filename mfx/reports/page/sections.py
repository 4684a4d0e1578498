"""The sections of the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mfx.reports.markup import Markup, element, joined
from mfx.reports.page.memory_lines import legend, lines
from mfx.reports.profile.result import Profile, measures, notes_of
from mfx.reports.table import Table
from mfx.text import amount, count, ratio, size

_PLACES = 40  # shown per reason
_NOTHING = "–"
_CODE = 60_000  # characters of code shown
_UNFOLDED = 40  # lines of code that are shown without unfolding


def summary(found: Mapping[str, Any], profile: Profile | None) -> Markup:
    """Return the chains, refusals and effects as a few numbers: measured ones, else predicted ones."""
    steps = sum(len(chain["steps"]) for chain in found["chains"])
    left = count(len(found["rejections"]), "residual add").partition(" ")[2]
    cards = [
        _card(str(len(found["chains"])), count(len(found["chains"]), "momentum chain").partition(" ")[2]),
        _card(str(steps), "residual steps turned into momentum steps"),
        _card(str(len(found["rejections"])), f"{left} left alone"),
    ]
    cards += [
        _card(ratio(value, first), f"{what}, relative to plain training")
        for what, value, first in _effects(found, profile)
    ]
    return element("div", *cards, class_="cards")


def _effects(found: Mapping[str, Any], profile: Profile | None) -> list[tuple[str, float, float]]:
    """Return what is compared, each with its value with mfx and without."""
    rows = {row.name: row for row in profile.rows} if profile is not None else {}
    if "plain" in rows and "momentum" in rows:
        plain, momentum = rows["plain"], rows["momentum"]
        return [
            ("activations after the forward pass", momentum.kept_bytes, plain.kept_bytes),
            ("peak of activations", momentum.peak_bytes, plain.peak_bytes),
            ("FLOPs", momentum.flops, plain.flops),
            ("time of a step", momentum.seconds, plain.seconds),
        ]
    totals = found.get("totals")
    if not totals:
        return []
    plain, momentum = totals["plain"], totals["momentum"]
    names = {"kept": "activations after the forward pass", "peak": "peak of activations", "flops": "FLOPs"}
    return [(f"predicted {name}", momentum[key], plain[key]) for key, name in names.items()]


def memory(profile: Profile | None, why_not: str) -> Markup:
    """Return the picture of activation memory over time, and the table of measurements."""
    if profile is None:
        return joined(element("h2", "Memory over time"), element("p", f"Not measured: {why_not}", class_="dim"))
    head = ("way to train", "kept", "peak", "time", "FLOPs")
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
        Table(head, body, numbers=4).page(),
        element("ul", *(element("li", note) for note in notes)) if notes else None,
    )


def chains(found: Mapping[str, Any], text: str) -> Markup:
    """Return a table with one row per chain, the advice, and the text of `mfx.explain`."""
    head = ("chain", "state", "arithmetic", "steps", "γ", "branches count", "plain keeps", "mfx keeps", "recomputes")
    rows = [_chain(chain) for chain in found["chains"]]
    table = Table(head, rows, numbers=6).page() if rows else element("p", "None.", class_="dim")
    advice = [element("li", advice) for advice in found.get("advice", ())]
    return joined(
        element("h2", "Chains"),
        table,
        element("p", "What is kept is kept between forward and backward, predicted.", class_="dim") if rows else None,
        element("p", "What could be done:") if advice else None,
        element("ul", *advice) if advice else None,
        element("details", element("summary", "As mfx.explain prints it"), element("pre", text)),
    )


def rejections(found: Mapping[str, Any]) -> Markup:
    """Return the residual adds that stay as they are, by reason."""
    by_reason: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for rejection in found["rejections"]:
        by_reason[rejection["reason"]].append(rejection)
    blocks = [_reason(reason, places) for reason, places in by_reason.items()]
    return joined(
        element("h2", "Left as they are"), *(blocks or [element("p", "No residual add was left alone.", class_="dim")])
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


def _chain(chain: Mapping[str, Any]) -> tuple[str, ...]:
    storage, memory = chain.get("storage") or {}, chain.get("memory") or {}
    shape = "×".join(map(str, storage.get("shape", ())))
    weights = [f"{weight:.2f}" for weight in chain.get("weights", ())]
    shown = " ".join(weights if len(weights) <= 4 else [*weights[:2], "…", *weights[-2:]])
    plain, kept = memory.get("plain"), memory.get("kept", storage.get("kept"))
    policy = f" ({storage['policy']})" if storage.get("policy") else ""
    return (
        chain["name"] or "the model itself",
        f"{shape} {storage['dtype']}" if storage.get("dtype") else _NOTHING,
        chain["arithmetic"],
        str(len(chain["steps"])),
        f"{chain['gamma']:g}",
        shown or _NOTHING,
        _NOTHING if plain is None else size(plain),
        _NOTHING if kept is None else f"{size(kept)}{policy}",
        amount(memory["recomputed"], "FLOP") if "recomputed" in memory else _NOTHING,
    )


def _reason(reason: str, places: Sequence[Mapping[str, Any]]) -> Markup:
    lines = [element("li", element("code", place["node"]), *_place(place)) for place in places[:_PLACES]]
    if len(places) > _PLACES:
        lines.append(element("li", f"and {len(places) - _PLACES} more"))
    remedy = places[0].get("remedy")
    return element(
        "details",
        element("summary", f"{len(places)} × {reason}"),
        element("p", f"What could be done: {remedy}") if remedy else None,
        element("ul", *lines),
    )


def _place(place: Mapping[str, Any]) -> list[str]:
    where = ", ".join(filter(None, (place.get("path"), place.get("source"))))
    return [f" in {where}"] if where else []
