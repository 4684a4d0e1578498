"""Draws how_it_works.svg, the figure of the README: what a chain keeps as it is, and as a momentum chain.

    python examples/figures/how_it_works.py

Three steps of a chain: of the residual network, of the momentum network forward, and backward.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 820, 714
COLUMNS = (90, 300, 510, 720)  # of the states
STEPS = tuple((left + right) / 2 for left, right in pairwise(COLUMNS))
RADIUS, HALF_BOX = 21, (30, 17)
SUBSCRIPTS = "₀₁₂₃"
KEPT, FREED, REBUILT = "kept", "freed", "rebuilt"
STYLE = """
text { font-family: Helvetica, Arial, sans-serif; font-size: 15px; fill: #1f2933; text-anchor: middle }
.title { font-size: 17px; font-weight: bold; text-anchor: start }
.formula { font-size: 16px; font-style: italic; text-anchor: start }
.note { font-size: 14px; fill: #52606d; text-anchor: start }
.small { font-size: 14px; fill: #52606d }
.paper { fill: #ffffff; stroke: #cbd2d9 }
.kept { fill: #f6b26b; stroke: #a85b00; stroke-width: 2 }
.freed { fill: #ffffff; stroke: #7b8794; stroke-width: 1.5 }
.rebuilt { fill: #e3effb; stroke: #2b6cb0; stroke-width: 1.5; stroke-dasharray: 5 3 }
.arrow { stroke: #3e4c59; stroke-width: 1.6; fill: none; marker-end: url(#head) }
.rule { stroke: #e4e7eb }
"""
HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" fill="#3e4c59"/></marker>'
)
Point = tuple[float, float]


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words, centred or from a point on, as their kind says."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def arrow(start: Point, end: Point) -> str:
    """A straight arrow."""
    return f'<path class="arrow" d="M{start[0]:g} {start[1]:g} L{end[0]:g} {end[1]:g}"/>'


def state(x: float, y: float, name: str, fate: str) -> str:
    """A state of the stream, or of the velocity."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{RADIUS}" class="{fate}"/>' + text(x, y + 5, name)


def branch(x: float, y: float, number: int, fate: str) -> str:
    """A branch f; behind it lies what it saves."""
    w, h = HALF_BOX
    sheets = [
        f'<rect x="{x - w + d:g}" y="{y - h + d:g}" width="{2 * w}" height="{2 * h}" rx="4" class="{fate}"/>'
        for d in (10, 5, 0)
    ]
    return "".join(sheets if fate == KEPT else sheets[-1:]) + text(x, y + 5, f"f{SUBSCRIPTS[number]}")


def heading(y: float, title: str, formula: str, note: str) -> str:
    """The words above a row."""
    return text(30, y, title, "title") + text(290, y, formula, "formula") + text(30, y + 22, note, "note")


def residual(top: float) -> str:
    """X ← x + f(x)."""
    y, low = top + 62, top + 112
    words = heading(
        top,
        "Residual network",
        "x ← x + f(x)",
        "Kept for the backward pass: the input and the activations of every branch, so more with every step.",
    )
    parts = [words]
    for t, (left, middle, right) in enumerate(zip(COLUMNS, STEPS, COLUMNS[1:], strict=False)):
        parts += [arrow((left + RADIUS, y), (right - RADIUS, y)), branch(middle, low, t, KEPT)]
        parts += [arrow((left + 15, y + 15), (middle - HALF_BOX[0] - 1, low))]
        parts += [arrow((middle + HALF_BOX[0] + 11, low), (right - 15, y + 16)), text(right - 34, y - 6, "+")]
    parts += [state(x, y, f"x{SUBSCRIPTS[t]}", KEPT if t < 3 else FREED) for t, x in enumerate(COLUMNS)]
    return "".join(parts)


def digit(x: float, y: float) -> str:
    """Draw a digit that multiplying v by γ dropped, in a store."""
    return f'<rect x="{x:g}" y="{y:g}" width="13" height="13" class="kept"/>'


def forward(top: float) -> str:
    """V ← γ·v + (1−γ)·f(x), x ← x + v."""
    y_v, y_f, y_x = top + 70, top + 120, top + 170
    parts = [
        heading(
            top,
            "Momentum network",
            "v ← γ·v + (1−γ)·f(x)  x ← x + v",
            "Kept: the last x and v, and the digits that γ·v drops, log₂(1/γ) bits a step. All else is freed at once.",
        )
    ]
    for t, (left, middle, right) in enumerate(zip(COLUMNS, STEPS, COLUMNS[1:], strict=False)):
        parts += [arrow((left + RADIUS, y), (right - RADIUS, y)) for y in (y_v, y_x)]
        parts += [arrow((right, y_v + RADIUS), (right, y_x - RADIUS)), branch(middle, y_f, t, FREED)]
        parts += [arrow((left + 15, y_x - 15), (middle - HALF_BOX[0] + 4, y_f + HALF_BOX[1] + 1))]
        parts += [arrow((middle + HALF_BOX[0] + 1, y_f - 5), (right - 17, y_v + 14))]
        parts += [
            text(middle, y_v - 7, "·γ"),
            text(middle + 72, y_f - 2, "·(1−γ)", "small"),
            text(right - 34, y_x - 6, "+"),
        ]
        parts += [digit(middle + 14, y_v - 24)] if t else []  # v₀ = 0 drops none
    parts += [state(x, y_v, f"v{SUBSCRIPTS[t]}", KEPT if t == 3 else FREED) for t, x in enumerate(COLUMNS)]
    parts += [state(x, y_x, f"x{SUBSCRIPTS[t]}", KEPT if t == 3 else FREED) for t, x in enumerate(COLUMNS)]
    return "".join(parts)


def backward(top: float) -> str:
    """X ← x − v, v ← (v − (1−γ)·f(x)) / γ."""
    y_v, y_f, y_x = top + 70, top + 120, top + 170
    parts = [
        heading(
            top,
            "Its backward pass",
            "x ← x − v  v ← (v − (1−γ)·f(x)) / γ",
            "From right to left, bit for bit. One branch at a time runs again, gives its gradients and is freed.",
        )
    ]
    for t, (left, middle, right) in enumerate(zip(COLUMNS, STEPS, COLUMNS[1:], strict=False)):
        parts += [arrow((right - RADIUS, y), (left + RADIUS, y)) for y in (y_v, y_x)]
        parts += [arrow((right - 8, y_v + 20), (right - 40, y_x - 1)), branch(middle, y_f, t, REBUILT)]
        parts += [arrow((left + 15, y_x - 15), (middle - HALF_BOX[0] - 1, y_f + 7))]
        parts += [arrow((middle - HALF_BOX[0] + 4, y_f - HALF_BOX[1] - 1), (left + 17, y_v + 14))]
        parts += [text(middle, y_v - 7, "/γ" if t else ""), text(right - 52, y_x - 6, "−")]
        parts += [digit(middle + 14, y_v - 24)] if t else []  # v₀ = 0 drops none
    parts += [state(x, y_v, f"v{SUBSCRIPTS[t]}", KEPT if t == 3 else REBUILT) for t, x in enumerate(COLUMNS)]
    parts += [state(x, y_x, f"x{SUBSCRIPTS[t]}", KEPT if t == 3 else REBUILT) for t, x in enumerate(COLUMNS)]
    return "".join(parts)


def legend(y: float) -> str:
    """Draw the meaning of the fills."""
    entries = ((KEPT, "kept until the backward pass"), (FREED, "freed at once"), (REBUILT, "rebuilt, then freed"))
    return "".join(
        f'<rect x="{x}" y="{y - 12}" width="26" height="15" rx="3" class="{fate}"/>' + text(x + 35, y, words, "note")
        for x, (fate, words) in zip((110, 390, 570), entries, strict=True)
    )


def figure() -> str:
    """The figure as SVG, on paper of its own: it is read on light and dark pages."""
    rules = "".join(f'<path class="rule" d="M30 {y} H{WIDTH - 30}"/>' for y in (190, 426, 662))
    body = residual(36) + forward(222) + backward(458) + legend(692)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f"<style>{STYLE}</style><defs>{HEAD}</defs>"
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="8" class="paper"/>{rules}{body}</svg>\n'
    ).replace("><", ">\n<")


def main(argv: Sequence[str] | None = None) -> Path:
    """Draws the figure; returns the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, default=FILE, help="where to save it")
    path: Path = parser.parse_args(argv).svg
    path.write_text(figure(), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
