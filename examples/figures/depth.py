"""Draws depth.svg, the figure of the README: the peak of a training step against depth, for five ways to train.

    python examples/benchmarks/depth.py --quick --json examples/benchmarks/results/depth.json
    python examples/figures/depth.py

The numbers are those that the benchmark wrote; none is written here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from examples.benchmarks.command import read_rows
from examples.benchmarks.depth import Row

FILE = Path(__file__).with_suffix(".svg")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "depth.json"
WIDTH, HEIGHT = 820, 330
LEFT, RIGHT, TOP, BOTTOM = 70, 500, 44, 280  # of the plot
LOW, HIGH = 10.0, 2000.0  # of the logarithmic axis
WAYS = {  # in the results: here, colour, line, distance of the words from the line's end
    "plain": ("plain", "#444444", "", 5),
    "checkpoint": ("checkpoint around every block", "#d9822b", "", -4),
    "mfx, gamma=0": ("mfx, γ = 0: the same function", "#8a6d3b", "2 5", 16),
    "mfx, float": ("mfx, γ = 0.9, float arithmetic", "#2f9e60", "", -2),
    "mfx, exact": ("mfx, γ = 0.9, exact arithmetic", "#2563c9", "", 12),
}
STYLE = """
text { font-family: Helvetica, Arial, sans-serif; font-size: 14px; fill: #1f2933 }
.note { fill: #52606d }
.middle { text-anchor: middle }
.end { text-anchor: end }
.title { font-size: 16px; font-weight: bold }
.paper { fill: #ffffff; stroke: #cbd2d9 }
.rule { stroke: #e4e7eb }
.line { fill: none; stroke-width: 2.5 }
"""


def _text(x: float, y: float, words: str, kind: str = "", fill: str = "") -> str:
    style = f' style="fill:{fill}"' if fill else ""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}"{style}>{escape(words)}</text>'


def _height(peak: float) -> float:
    share = math.log(peak / LOW) / math.log(HIGH / LOW)
    return round(BOTTOM - share * (BOTTOM - TOP), 1)


def _across(depth: int, depths: Sequence[int]) -> float:
    share = math.log(depth / depths[0]) / math.log(depths[-1] / depths[0])
    return round(LEFT + 20 + share * (RIGHT - LEFT - 40), 1)


def _way(rows: Sequence[Row], depths: Sequence[int]) -> str:
    """Draw the line of one method, with its name and last value at its end."""
    words, colour, dashes, below = WAYS[rows[0].method]
    points = [(_across(row.depth, depths), _height(row.peak)) for row in rows]
    line = " L".join(f"{x:g} {y:g}" for x, y in points)
    dots = "".join(f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{colour}"/>' for x, y in points)
    x, y = points[-1]
    label = _text(x + 14, y + below, f"{rows[-1].peak:.0f}  {words}", fill=colour)
    return f'<path class="line" d="M{line}" stroke="{colour}" stroke-dasharray="{dashes}"/>{dots}{label}'


def figure(rows: Sequence[Row]) -> str:
    """The figure as SVG, on paper of its own: it is read on light and dark pages."""
    depths = sorted({row.depth for row in rows})
    parts = [_text(30, 28, "Activations at the peak of a training step, in tensors of the stream's size", "title")]
    for tick in (10, 100, 1000):
        y = _height(tick)
        parts += [f'<path class="rule" d="M{LEFT} {y:g} H{RIGHT}"/>', _text(LEFT - 8, y + 5, str(tick), "note end")]
    parts += [_text(_across(depth, depths), BOTTOM + 20, str(depth), "note middle") for depth in depths]
    parts += [_text((LEFT + RIGHT) / 2, BOTTOM + 40, "residual blocks (both axes are logarithmic)", "note middle")]
    parts += [_way([row for row in rows if row.method == method], depths) for method in WAYS]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f"<style>{STYLE}</style>"
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="8" class="paper"/>{"".join(parts)}</svg>\n'
    ).replace("><", ">\n<")


def main(argv: Sequence[str] | None = None) -> Path:
    """Draws the figure; returns the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, default=FILE, help="where to save it")
    path: Path = parser.parse_args(argv).svg
    path.write_text(figure(read_rows(json.loads(RESULTS.read_text()), Row)), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
