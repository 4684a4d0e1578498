"""A picture of memory in the course of a training step, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mfx.reports.markup import Markup, element
from mfx.reports.profile.rows import ProfileRow
from mfx.text import size

_WIDTH, _HEIGHT = 480.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 80.0, 18.0, 10.0, 40.0
_COLOURS = 6


def lines(rows: Sequence[ProfileRow]) -> Markup:
    """Return a line per row: bytes alive against the share of the step, a ring at the end of the forward pass."""
    top, ticks = _scale(max(row.peak_bytes for row in rows))
    grid = [
        element("line", class_="grid", x1=_n(_LEFT), x2=_n(_x(1)), y1=y, y2=y) for y in (_n(_y(t, top)) for t in ticks)
    ]
    marks = [_text(_LEFT - 6, _y(tick, top) + 4, size(tick) if tick else "0", "end") for tick in ticks]
    marks += [_text(_x(share), _y(0, top) + 16, f"{share:.0%}", "middle") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    marks.append(_text((_LEFT + _x(1)) / 2, _HEIGHT - 6, "share of the step's operations", "middle"))
    drawn = [_line(row, number, top) for number, row in enumerate(rows)]
    drawn += [_ring(row, number, top) for number, row in enumerate(rows) if row.timeline]
    return element(
        "svg",
        *grid,
        *marks,
        *drawn,
        class_="plot",
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label="activation memory in the course of a training step: "
        + "; ".join(f"{row.name}, peak {size(row.peak_bytes)}" for row in rows),
    )


def legend(rows: Sequence[ProfileRow]) -> Markup:
    """Return the name and peak of each line, beside its colour."""
    items = [
        element(
            "li",
            element(
                "svg", element("line", class_=_colour(i), x1="0", x2="20", y1="5", y2="5"), width="20", height="10"
            ),
            f"{row.name}: peak {size(row.peak_bytes)}",
        )
        for i, row in enumerate(rows)
    ]
    return element("ul", *items, class_="legend")


def _line(row: ProfileRow, number: int, top: float) -> Markup:
    points = " ".join(f"{_x(share):.1f},{_y(alive, top):.1f}" for share, alive in row.timeline)
    return element("polyline", class_=_colour(number), points=points)


def _ring(row: ProfileRow, number: int, top: float) -> Markup:
    return element(
        "circle", class_=_colour(number), cx=_n(_x(row.forward_ends)), cy=_n(_y(row.kept_bytes, top)), r="3.5"
    )


def _scale(peak: float) -> tuple[float, list[float]]:
    """Return the top of the axis and its marks, a round number of B, KiB, MiB … apart."""
    unit = 1024.0 ** max(0, int(math.log(max(peak, 1), 1024)))
    rough = max(peak, 1) / unit / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough) * unit
    count = max(1, math.ceil(max(peak, 1) / step))
    return step * count, [step * i for i in range(count + 1)]


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(alive: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - alive / top * (_HEIGHT - _TOP - _BOTTOM)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return element("text", text, x=_n(x), y=_n(y), text_anchor=anchor)


def _colour(number: int) -> str:
    return f"way{number % _COLOURS}"


def _n(number: float) -> str:
    return f"{number:.1f}"
