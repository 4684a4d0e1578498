"""What a training step costs per residual block where the blocks themselves cost next to nothing.

    python examples/benchmarks/overhead.py

Sixty-four blocks x + Linear(GELU(Linear(LayerNorm(x)))) of width 8 on a batch of one: what is left to measure is
Python and kernel launches. All methods take turns in one process; medians of processor time, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mfx

WIDTH = 8
Forward = Callable[[Tensor], Tensor]


class Branch(nn.Module):
    """What a block adds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        return self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    """Residual blocks in a row."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        for branch in self.branches:
            x = x + branch(x)
        return x


@dataclass(frozen=True)
class Row:
    """One line of the result: microseconds per block."""

    method: str
    forward: float
    backward: float


def checkpointed(net: Net) -> Forward:
    """The net with every branch under ``torch.utils.checkpoint``."""

    def forward(x: Tensor) -> Tensor:
        for branch in net.branches:
            x = x + checkpoint(branch, x, use_reentrant=False)
        return x

    return forward


def methods(net: Net) -> dict[str, Forward]:
    """Ways to train the net, by name."""
    return {
        "plain": net,
        "torch.utils.checkpoint": checkpointed(net),
        "mfx, exact": mfx.momentumize(net),
        "mfx, float": mfx.momentumize(net, arithmetic="float"),
        "mfx, gamma 0": mfx.momentumize(net, gamma=0.0),
        "mfx, float, all kept": mfx.momentumize(net, arithmetic="float", memory_budget=1.0),
    }


def time_step(forward: Forward, x: Tensor) -> tuple[float, float]:
    """Seconds of processor time of one forward and one backward pass."""
    start = time.process_time()
    loss = forward(x).sum()
    middle = time.process_time()
    loss.backward()
    return middle - start, time.process_time() - middle


def measure(depth: int, repeats: int) -> list[Row]:
    """Times every method ``repeats`` times, in turns."""
    torch.manual_seed(0)
    ways, x = methods(Net(depth)), torch.randn(1, WIDTH)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 2):
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
    """The rows as a Markdown table."""
    lines = ["| µs per block | forward | backward | together |", "|---|---|---|---|"]
    lines += [f"| {r.method} | {r.forward:.0f} | {r.backward:.0f} | {r.forward + r.backward:.0f} |" for r in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark; returns one row per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=64, help="residual blocks (default 64)")
    parser.add_argument("--repeats", type=int, default=40, help="measurements of every method (default 40)")
    parser.add_argument("--tiny", action="store_true", help="a moment's work, to see that it runs")
    options = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = measure(8, 2) if options.tiny else measure(options.depth, options.repeats)
    torch.set_num_threads(threads)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
