"""A table of text, laid out for a terminal, a notebook or a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mfx.reports.markup import Markup, element
from mfx.text import shorten

WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class Table:
    """Rows of text under a head.

    Attributes:
        head: a label per column.
        rows: a text per column.
        numbers: how many columns, the last ones, are aligned to the right.
    """

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: int = 0

    def lines(self, width: int | None = None) -> list[str]:
        """Return aligned lines of text, their first column cut to at least 12 characters to fit into ``width``."""
        rows = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        if width is not None:
            widths[0] = min(widths[0], max(width - sum(2 + other for other in widths[1:]), 12))
        pads = [str.ljust] * (len(self.head) - self.numbers) + [str.rjust] * self.numbers
        cut = [(shorten(row[0], widths[0]), *row[1:]) for row in rows]
        return ["  ".join(pad(t, w) for pad, t, w in zip(pads, row, widths, strict=True)).rstrip() for row in cut]

    def html(self, style: str | None = None) -> Markup:
        """Return a plain HTML table of the class ``style``, for a notebook."""
        head = element("tr", *(element("th", text) for text in self.head))
        body = (element("tr", *(element("td", text) for text in row)) for row in self.rows)
        return element("table", head, *body, class_=style)

    def page(self) -> Markup:
        """Return an HTML table whose cells carry their labels, which a narrow page shows beside them."""
        kinds = ["name", *[None] * (len(self.head) - self.numbers - 1), *["number"] * self.numbers]

        def row(tag: str, texts: Sequence[str]) -> Markup:
            cells = zip(texts, kinds, self.head, strict=True)
            return element("tr", *(element(tag, text, class_=kind, data_label=label) for text, kind, label in cells))

        head, body = (
            element("thead", row("th", self.head)),
            element("tbody", *(row("td", texts) for texts in self.rows)),
        )
        reachable = {
            "tabindex": "0",
            "role": "region",
            "aria_label": ", ".join(filter(None, self.head)),
        }  # to scroll it
        return element("div", element("table", head, body), class_="wide", **reachable)
