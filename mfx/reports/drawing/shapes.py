"""The shapes of boxes: SVG elements with their size."""

from __future__ import annotations

from dataclasses import dataclass

from mfx.reports.drawing.boxes import Box, ChainBox, Fold, ModuleBox, StepLine, ValueBox
from mfx.reports.markup import attribute, escape, text_width
from mfx.text import shorten

FONT = 13.0
_SMALL = 11.0
_PAD = 10.0
_LINE = 19.0
_BADGE = 44.0  # the column for the number of repeats
_CHARACTERS = 60  # of a formula or a path

STYLE = """
.mfx-drawing { --ground: #ffffff; --ink: #1c2330; --dim: #5b6577; --line: #8a94a6; --box: #f3f5f8; --edge: #c9d0da;
  --chain: #e9f1ff; --chain-edge: #2f6fde; --row: #ffffff; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", "Liberation Mono", monospace; font-size: 13px; }
@media (prefers-color-scheme: dark) { .mfx-drawing { --ground: #12161d; --ink: #e6eaf0; --dim: #9aa5b5; --line: #77828f;
  --box: #1d232d; --edge: #3a4453; --chain: #16243d; --chain-edge: #6ea1ff; --row: #1b2b49; } }
.mfx-drawing text { fill: var(--ink); white-space: pre; }
.mfx-drawing .small { font-size: 11px; fill: var(--dim); }
.mfx-drawing .name { font-weight: 600; }
.mfx-drawing .dim { fill: var(--dim); font-weight: 400; }
.mfx-drawing .count { fill: var(--chain-edge); font-weight: 600; }
.mfx-drawing .ground { fill: var(--ground); }
.mfx-drawing .box, .mfx-drawing .value { fill: var(--box); stroke: var(--edge); }
.mfx-drawing .chain { fill: var(--chain); stroke: var(--chain-edge); stroke-width: 1.5; }
.mfx-drawing .fold { fill: var(--row); stroke: var(--edge); }
.mfx-drawing .edge { fill: none; stroke: var(--line); stroke-width: 1.3; }
.mfx-drawing .bracket { fill: none; stroke: var(--chain-edge); }
.mfx-drawing .head { fill: var(--line); }
"""


@dataclass(frozen=True)
class Shape:
    """SVG elements of a box, relative to its upper left corner."""

    width: float
    height: float
    elements: tuple[str, ...]

    def at(self, x: float, y: float) -> str:
        """Return the elements, moved to a position."""
        return f'<g transform="translate({x:g} {y:g})">{"".join(self.elements)}</g>'


def shape(box: Box) -> Shape:
    """Return the shape of a box."""
    if isinstance(box, ChainBox):
        return _chain(box)
    return _value(box) if isinstance(box, ValueBox) else _module(box)


def line(x: float, y: float, text: str, style: str = "", *, anchor: str = "start") -> str:
    """Return a line of text, escaped; ``y`` is its base line."""
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _value(box: ValueBox) -> Shape:
    name = shorten(box.name, _CHARACTERS)
    width = text_width(name, FONT) + 3 * _PAD
    rectangle = f'<rect class="value" width="{width:g}" height="26" rx="13"/>'
    return Shape(width, 26, (rectangle, line(width / 2, 17.5, name, anchor="middle")))


def _module(box: ModuleBox) -> Shape:
    name, kind = shorten(box.name, _CHARACTERS - 14), shorten(box.kind, 24)
    width = text_width(f"{name}  {kind}".strip(), FONT) + 2 * _PAD
    text = f'{escape(name)}<tspan class="dim">  {escape(kind)}</tspan>'
    elements = (
        f"<title>{escape(shorten(box.tooltip, 1000))}</title>",
        f'<rect class="box" width="{width:g}" height="28" rx="4"/>',
        f'<text x="{_PAD:g}" y="18.5">{text}</text>',
    )
    return Shape(width, 28, elements)


def _chain(box: ChainBox) -> Shape:
    folds = [_fold(fold) for fold in box.folds]
    name, facts = shorten(box.name, _CHARACTERS), shorten(box.facts, 76)
    width = max(text_width(name, FONT), text_width(facts, _SMALL), *(fold.width for fold in folds)) + 2 * _PAD
    y = 46.0
    inside = []
    for fold in folds:
        stretched = f'<rect class="fold" width="{width - 2 * _PAD:g}" height="{fold.height:g}" rx="4"/>'
        inside.append(Shape(width, fold.height, (stretched, *fold.elements)).at(_PAD, y))
        y += fold.height + 6
    height = y + 4
    elements = (
        f'<rect class="chain" width="{width:g}" height="{height:g}" rx="8"/>',
        line(_PAD, 20, name, "name"),
        line(_PAD, 37, facts, "small"),
        *inside,
    )
    return Shape(width, height, (f"<g aria-label={attribute(f'chain {box.name}: {box.facts}')}>", *elements, "</g>"))


def _fold(fold: Fold) -> Shape:
    left = _BADGE if fold.count > 1 else _PAD
    elements: list[str] = []
    y, width = 4.0, 0.0
    for row in fold.rows:
        drawn = _row(row)
        elements.append(drawn.at(left, y))
        y += drawn.height
        width = max(width, drawn.width)
    place = shorten(fold.place or "the model itself", _CHARACTERS + 8)
    elements.append(line(left, y + 11, place, "small"))
    if fold.count > 1:
        elements.append(line(left - 14, (y + 4) / 2 + 4.5, f"×{fold.count}", "count", anchor="end"))
        elements.append(f'<path class="bracket" d="M{left - 6:g} 7h-4v{y - 10:g}h4"/>')
    return Shape(left + max(width, text_width(place, _SMALL)) + _PAD, y + 18, tuple(elements))


def _row(row: StepLine) -> Shape:
    text = "   ".join(shorten(formula, _CHARACTERS // len(row.texts)) for formula in row.texts)
    whole = "   ".join(row.texts)
    elements = [f"<g><title>{escape(whole)} ({escape(shorten(row.tooltip, 1000))})</title>{line(0, 14.5, text)}</g>"]
    y, width = _LINE, text_width(text, FONT)
    for box in row.inner:
        drawn = _chain(box)
        elements.append(drawn.at(0, y + 2))
        y += drawn.height + 8
        width = max(width, drawn.width)
    return Shape(width, y, tuple(elements))
