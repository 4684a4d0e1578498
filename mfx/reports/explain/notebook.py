"""An explanation for a notebook: tables that inherit their colours from the page, light or dark."""

from __future__ import annotations

from collections.abc import Iterable

from mfx.reports.explain.tables import BLOCKS, Contents, RejectedGroup
from mfx.reports.markup import Markup, element, joined
from mfx.reports.table import Table

_STYLE = """
.mfx{color:inherit;background:transparent;font-size:.95em}
.mfx .wide{overflow-x:auto}
.mfx table{border-collapse:collapse;margin:.6em 0;color:inherit;background:transparent}
.mfx tr{background:transparent!important}
.mfx th,.mfx td{text-align:left;padding:.2em .8em .2em 0;border-bottom:1px solid rgba(128,128,128,.4);color:inherit}
.mfx .number td+td,.mfx .number th+th{text-align:right;font-variant-numeric:tabular-nums}
.mfx li{margin:.2em 0}
.mfx small{opacity:.75}
"""


def page(contents: Contents) -> Markup:
    """Return the tables as HTML, with every name escaped."""
    return element(
        "div",
        element("style", Markup(_STYLE)),
        element("strong", contents.verdict),
        _table(contents.memory, "number"),
        _table(contents.chains),
        element("p", contents.signs) if contents.signs else None,
        _paragraph("memory could not be predicted", contents.unpredicted),
        _list("kept between forward and backward", [f"{name}: {policy}" for name, policy in contents.policies]),
        _list("what could be done", contents.advice),
        _list("chains are cut before", contents.cuts),
        _rejections("left as they are", contents.rejections),
        _paragraph(BLOCKS, ", ".join(contents.blocks)),
        _rejections("only look like residual steps", contents.others),
        _paragraph("hooks on these modules do not run", ", ".join(contents.unheard)),
        _list("called as a whole, since a trace cannot follow them", map(": ".join, contents.leaves)),
        _list("decided in each call anew, by the values of tensors", contents.conditions),
        _list("not one graph, because of these lines; behind each, momentum starts anew", contents.breaks),
        *(element("details", element("summary", f"steps of {name}"), _table(steps)) for name, steps in contents.steps),
        class_="mfx",
    )


def _table(table: Table, style: str = "") -> Markup | None:
    return element("div", table.html(style), class_="wide") if table.rows else None


def _paragraph(title: str, what: str) -> Markup | None:
    return element("p", f"{title}: {what}") if what else None


def _list(title: str, items: Iterable[str]) -> Markup | None:
    found = [element("li", item) for item in items]
    return joined(element("p", f"{title}:"), element("ul", *found)) if found else None


def _rejections(title: str, groups: Iterable[RejectedGroup]) -> Markup | None:
    found = [_group(group) for group in groups]
    return joined(element("p", f"{title}:"), *found) if found else None


def _group(group: RejectedGroup) -> Markup:
    to_do = joined(Markup("<br>"), element("small", f"to do: {group.remedy}")) if group.remedy else None
    summary = element("summary", f"{len(group.places)} × {group.reason}", to_do)
    return element("details", summary, element("ul", *(element("li", place) for place in group.places)))
