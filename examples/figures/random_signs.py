"""Draws random_signs.svg, the figure of the guide: validation over training steps, for each way to train.

    python -m examples.train_code_model --json examples/benchmarks/results/train_code_model.json
    python examples/figures/random_signs.py

A line is the mean over seeds, the band around it their range. The numbers are those that the example wrote; none is
written here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from examples.figures.depth import STYLE
from examples.train_code_model import by_variant

FILE = Path(__file__).with_suffix(".svg")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "train_code_model.json"
WIDTH, HEIGHT = 820, 330
LEFT, RIGHT, TOP, BOTTOM = 70, 540, 44, 280  # of the plot
WORDS = 19  # between two lines of words, at least
COLOURS = {
    "plain": "#444444",
    "gamma 0.9": "#2563c9",
    "annealed to 0.9": "#2f9e60",
    "BDIA 1/8": "#b8860b",
    "BDIA 1/4": "#d9822b",
    "BDIA 1/2": "#b03a2e",
}


def _apart(heights: Sequence[float]) -> list[float]:
    """Return heights, which ascend, moved down until words at them do not overlap."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + WORDS) if found else height)
    return found


def figure(runs: Sequence[dict[str, Any]]) -> str:
    """The figure as SVG, on paper of its own: it is read on light and dark pages."""
    found = {variant: alike for variant, (alike, _) in by_variant(runs).items()}
    seen = [bits for alike in found.values() for run in alike for bits in run["bits"][1:]]
    low, high = min(seen), max(seen)
    steps = next(iter(found.values()))[0]["steps"][1:]  # before training, all are at eight bits

    def across(step: int) -> float:
        return round(LEFT + 20 + (step - steps[0]) / max(1, steps[-1] - steps[0]) * (RIGHT - LEFT - 40), 1)

    def height(bits: float) -> float:
        return round(BOTTOM - 12 - (bits - low) / ((high - low) or 1) * (BOTTOM - TOP - 24), 1)

    parts = ['<text x="30" y="28" class="title">Bits per byte of unseen Python sources, during training</text>']
    for number in range(5):
        bits = low + (high - low) * number / 4
        parts.append(f'<path class="rule" d="M{LEFT} {height(bits):g} H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height(bits) + 5:g}" class="note end">{bits:.2f}</text>')
    parts += [f'<text x="{across(s):g}" y="{BOTTOM + 20}" class="note middle">{s}</text>' for s in steps]
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:g}" y="{BOTTOM + 40}" class="note middle">training steps</text>')
    ends = []
    for variant, alike in found.items():
        columns = list(zip(*(run["bits"][1:] for run in alike), strict=True))
        mean, top, bottom = (
            [f"{across(s):g} {height(of(c)):g}" for s, c in zip(steps, columns, strict=True)]
            for of in (statistics.mean, max, min)
        )
        colour = COLOURS[variant]
        parts.append(f'<path d="M{" L".join([*top, *reversed(bottom)])} Z" fill="{colour}" fill-opacity="0.2"/>')
        parts.append(f'<path class="line" d="M{" L".join(mean)}" stroke="{colour}"/>')
        ends.append((statistics.mean(columns[-1]), variant))
    places = _apart([height(bits) + 5 for bits, _ in sorted(ends, reverse=True)])
    for place, (bits, variant) in zip(places, sorted(ends, reverse=True), strict=True):
        words = escape(f"{bits:.2f}  {variant.replace('gamma', 'γ =').replace('BDIA ', 'random signs, ±')}")
        parts.append(f'<text x="{RIGHT - 4}" y="{place:g}" style="fill:{COLOURS[variant]}">{words}</text>')
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
    path.write_text(figure(json.loads(RESULTS.read_text())["runs"]), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
