"""Memory and time of one training step against depth, 8 to 1024 residual blocks.

    python examples/benchmarks/depth.py --quick

Blocks x + Linear(GELU(Linear(LayerNorm(x)))), width 64, four times as wide inside. Memory is counted exactly, in units
of one (batch, 64) float32 tensor: what is alive at worst, without parameters and their gradients. The methods take
turns; times are medians, as ratios to plain training at the same depth where that fits into ``--limit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mfx
from examples.benchmarks.blocks import Residual
from examples.benchmarks.command import on_threads, parser_of, write_results

WIDTH = 64
GIB = 2**30
METHODS: dict[str, Any] = {
    "plain": "plain",
    "checkpoint": "checkpoint",
    "mfx, gamma=0": {"gamma": 0.0},
    "mfx, float": {"gamma": 0.9, "arithmetic": "float"},
    "mfx, exact": {"gamma": 0.9},
}
COLOURS = dict(zip(METHODS, ("#444444", "#d9822b", "#8a6d3b", "#2f9e60", "#2563c9"), strict=True))


@dataclass(frozen=True)
class Row:
    """One method at one depth; memory in units."""

    method: str
    depth: int
    kept: float
    peak: float
    seconds: float
    to_plain: float | None
    flops: float | None


def compare(depth: int, batch: int, rounds: int, device: torch.device, *, with_plain: bool) -> list[Row]:
    """All methods at one depth."""
    torch.manual_seed(0)
    model = Residual(depth, WIDTH).to(device)
    x = torch.randn(batch, WIDTH, device=device)
    methods = {name: way for name, way in METHODS.items() if with_plain or name != "plain"}
    found = {row.name: row for row in mfx.profile(model, x, against=methods, repeats=rounds, progress=False).rows}
    plain = found.get("plain")
    return [
        Row(
            name,
            depth,
            row.kept_bytes / x.nbytes,
            row.peak_bytes / x.nbytes,
            row.seconds,
            row.seconds / plain.seconds if plain else None,
            row.flops / plain.flops if plain else None,
        )
        for name, row in found.items()
    ]


def measure(depths: Sequence[int], batch: int, rounds: int, device: torch.device, limit: float) -> list[Row]:
    """All depths; plain training as long as it is foreseen to stay below ``limit`` GiB."""
    rows: list[Row] = []
    per_block = 0.0  # GiB of plain training
    for depth in tqdm(depths, unit="depth"):
        rows += compare(depth, batch, rounds, device, with_plain=per_block * depth < limit)
        plain = [row for row in rows if (row.method, row.depth) == ("plain", depth)]
        per_block = plain[0].peak * batch * WIDTH * 4 / GIB / depth if plain else per_block
    return rows


def slopes(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Of each method, units of peak memory and milliseconds per further block, over the deeper half of the depths."""
    result = {}
    for method in METHODS:
        same = sorted((row for row in rows if row.method == method), key=lambda row: row.depth)
        if len(same) > 1:
            first, last = same[(len(same) - 1) // 2], same[-1]
            blocks = last.depth - first.depth
            result[method] = (last.peak - first.peak) / blocks, (last.seconds - first.seconds) / blocks * 1e3
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, and what a further block costs as another."""
    lines = ["| method | depth | after forward | peak | FLOPs | time | s |", "|---|--:|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.method} | {row.depth} | {row.kept:.1f} | {row.peak:.1f} | {_number(row.flops)} "
        f"| {_number(row.to_plain)} | {row.seconds:.3f} |"
        for row in rows
    ]
    lines += ["", "| a further block costs | units | ms |", "|---|--:|--:|"]
    lines += [f"| {method} | {units:.3f} | {ms:.2f} |" for method, (units, ms) in slopes(rows).items()]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Peak memory and time against depth, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained", dpi=150, facecolor="white")
    left, right = figure.subplots(1, 2)
    for method, colour in COLOURS.items():
        same = [row for row in rows if row.method == method]
        depths = [row.depth for row in same]
        line = {"color": colour, "label": method, "linestyle": ":" if "gamma=0" in method else "-"}  # on checkpoint's
        left.plot(depths, [row.peak for row in same], marker="o", markersize=4, **line)
        right.plot(depths, [row.seconds for row in same], marker="o", markersize=4, **line)
    left.set_ylabel(f"peak activation memory, in (batch, {WIDTH}) tensors")
    right.set_ylabel("time of a training step, s")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_yscale("log")
        axes.set_xlabel("residual blocks")
        axes.grid(alpha=0.25)
    left.legend(frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the tables."""
    parser = parser_of(__doc__, quick="to 128 blocks, fewer repetitions")
    parser.add_argument("--batch", type=int, default=256, help="batch size (default 256)")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB that plain training may take (default 4)")
    options = parser.parse_args(argv)
    depths, rounds, batch = [8, 16, 32, 64, 128, 256, 512, 1024], 3, options.batch
    if options.quick:
        depths, rounds = [8, 32, 128], 3
    if options.tiny:
        depths, rounds, batch = [4, 8, 16], 1, 4
    with on_threads(options.threads):
        rows = measure(depths, batch, rounds, options.device, options.limit)
    print(table(rows))
    write_results(__file__, options, rows)
    if options.plot is not None:
        plot(rows, options.plot)
    return rows


if __name__ == "__main__":
    main()
