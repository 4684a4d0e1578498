"""An explanation for a notebook: tables that take their colours from what is around them, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from mfx.reports.explain.tables import CHAINS, MEMORY, STEPS, Contents, RejectedGroup, Rows

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


def page(contents: Contents) -> str:
    """Return the tables as HTML, with every name escaped."""
    parts = [
        f"<strong>{escape(contents.headline)}</strong>",
        _table(CHAINS, contents.chains),
        _table(MEMORY, contents.memory, "number"),
        _paragraph("memory could not be predicted", contents.unpredicted),
        _list("kept between forward and backward", (f"{name}: {policy}" for name, policy in contents.policies)),
        _list("what could be done", contents.advice),
        _rejections(contents.rejections),
        _paragraph("hooks on these modules do not run", ", ".join(contents.flat)),
        *(_steps(name, rows) for name, rows in contents.steps),
    ]
    return f'<div class="mfx"><style>{_STYLE}</style>{"".join(parts)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    if not rows:
        return ""
    body = "".join(_row(row, "td") for row in rows)
    return f'<div class="wide"><table class="{style}">{_row(head, "th")}{body}</table></div>'


def _row(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _paragraph(title: str, what: str) -> str:
    return f"<p>{escape(title)}: {escape(what)}</p>" if what else ""


def _list(title: str, items: Iterable[str]) -> str:
    found = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<p>{escape(title)}:</p><ul>{found}</ul>" if found else ""


def _rejections(groups: Iterable[RejectedGroup]) -> str:
    found = []
    for group in groups:
        to_do = f"<br><small>to do: {escape(group.remedy)}</small>" if group.remedy else ""
        places = "".join(f"<li>{escape(place)}</li>" for place in group.places)
        summary = f"{len(group.places)} × {escape(group.reason)}{to_do}"
        found.append(f"<details><summary>{summary}</summary><ul>{places}</ul></details>")
    return f"<p>left as they are:</p>{''.join(found)}" if found else ""


def _steps(chain: str, rows: Rows) -> str:
    return f"<details><summary>steps of {escape(chain)}</summary>{_table(STEPS, rows)}</details>"
