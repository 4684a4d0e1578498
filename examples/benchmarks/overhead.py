"""The cost of a training step, and of a pass without gradients, per residual block that costs next to nothing.

    python examples/benchmarks/overhead.py

Sixty-four blocks x + Linear(GELU(Linear(LayerNorm(x)))) of width 8 on a batch of one: what is left to measure is
Python and kernel launches. The momentum recurrence written by hand shows what it takes by itself. All methods take
turns in one process; medians of processor time, on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import mfx
from examples.benchmarks.blocks import Residual
from examples.benchmarks.command import on_threads, parser_of, write_results

WIDTH = 8
ONCE = ("plain", "recurrence", "mfx, float, all kept")  # the others run every branch twice
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the result: microseconds per block, of a training step and of a pass without gradients."""

    method: str
    forward: float
    backward: float
    inference: float


def checkpointed(net: Residual) -> Forward:
    """The net with every branch under ``torch.utils.checkpoint``."""

    def forward(x: Tensor) -> Tensor:
        for branch in net.branches:
            x = x + checkpoint(branch, x, use_reentrant=False)
        return x

    return forward


def recurrence(net: Residual, gamma: float) -> Forward:
    """v ← γ·v + (1−γ)·f(x), x ← x + v, and nothing else."""

    def forward(x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for branch in net.branches:
            v = torch.add(v * gamma, branch(x), alpha=1 - gamma)
            x = x + v
        return x

    return forward


def methods(net: Residual) -> dict[str, Forward]:
    """Ways to train the net, by name."""
    return {
        "plain": net,
        "torch.utils.checkpoint": checkpointed(net),
        "recurrence": recurrence(net, 0.9),
        "mfx, exact": mfx.momentumize(net),
        "mfx, float": mfx.momentumize(net, arithmetic="float"),
        "mfx, gamma 0": mfx.momentumize(net, gamma=0.0),
        "mfx, float, all kept": mfx.momentumize(net, arithmetic="float", memory_budget=1.0),
    }


def time_step(forward: Forward, x: Tensor) -> tuple[float, float, float]:
    """Seconds of processor time of one forward and one backward pass, and of a pass without gradients."""
    start = time.process_time()
    loss = forward(x).sum()
    middle = time.process_time()
    loss.backward()
    end = time.process_time()
    with torch.no_grad():
        forward(x)
    return middle - start, end - middle, time.process_time() - end


def measure(depth: int, repeats: int) -> list[Row]:
    """Times every method ``repeats`` times, in turns."""
    torch.manual_seed(0)
    ways, x = methods(Residual(depth, WIDTH)), torch.randn(1, WIDTH)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for repeat in tqdm(range(repeats + 2), unit="round"):
        for name, forward in ways.items():
            seconds = time_step(forward, x)
            if repeat >= 2:  # before that, graphs are captured and buffers watched
                times[name].append(seconds)
    medians = {
        name: [statistics.median(column) / depth * 1e6 for column in zip(*found, strict=True)]
        for name, found in times.items()
    }
    return [Row(name, *columns) for name, columns in medians.items()]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; machinery is what comes on top of plain passes, as many as a method makes."""
    plain, by_hand = rows[0], next(row for row in rows if row.method == "recurrence")
    lines = ["| µs per block | forward | backward | together | machinery | no gradients | to the recurrence |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        together = row.forward + row.backward
        passes = plain.forward + plain.backward + (0 if row.method in ONCE else plain.forward)
        lines.append(
            f"| {row.method} | {row.forward:.0f} | {row.backward:.0f} | {together:.0f} | {together - passes:.0f} "
            f"| {row.inference:.0f} | {row.inference / by_hand.inference:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark; returns one row per method."""
    parser = parser_of(__doc__, quick="fewer measurements", on_device=False, draws=False)
    parser.add_argument("--depth", type=int, default=64, help="residual blocks (default 64)")
    parser.add_argument("--repeats", type=int, default=40, help="measurements of every method (default 40)")
    options = parser.parse_args(argv)
    repeats = 10 if options.quick else options.repeats
    with on_threads(1):
        rows = measure(8, 2) if options.tiny else measure(options.depth, repeats)
    print(table(rows))
    write_results(__file__, options, rows)
    return rows


if __name__ == "__main__":
    main()
