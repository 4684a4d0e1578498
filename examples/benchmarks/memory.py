"""Activation memory, work and time of one training step, for every way to train a deep residual network.

    python examples/benchmarks/memory.py --quick

Residual blocks x + Linear(GELU(Linear(LayerNorm(x)))), width 64, four times as wide inside. Memory is counted exactly,
in units of one (batch, 64) float32 tensor; parameters and their gradients are left out, and a parameter's gradient is
freed as soon as it is there. Work is counted by torch's FLOP formulas. Times are medians, as ratios to plain training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from momentumnet import MomentumNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import mfx
from mfx.meter import ActivationMeter

WIDTH = 64
Forward = Callable[[Tensor], Tensor]


class Branch(nn.Module):
    """What a block adds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """f(x), of the shape of x."""
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """A stack of blocks, as anybody would write it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The state after the last block."""
        for branch in self.branches:
            x = x + branch(x)
        return x


@dataclass(frozen=True)
class Row:
    """One method at one size; memory in units, work and time relative to plain training."""

    method: str
    batch: int
    depth: int
    after_forward: float
    peak: float
    flops: float
    time: float


def checkpointed(model: Residual, segments: int) -> Forward:
    """``torch.utils.checkpoint`` around every so many blocks."""
    blocks = list(model.branches)
    size = len(blocks) // segments

    def run(x: Tensor, start: int) -> Tensor:
        for branch in blocks[start : start + size]:
            x = x + branch(x)
        return x

    def forward(x: Tensor) -> Tensor:
        for start in range(0, len(blocks), size):
            x = checkpoint(run, x, start, use_reentrant=False)
        return x

    return forward


def methods(model: Residual) -> dict[str, Forward]:
    """Everything that is compared."""
    depth = len(model.branches)
    return {
        "plain": model,
        "checkpoint, every block": checkpointed(model, depth),
        "checkpoint, segments of 4": checkpointed(model, depth // 4),
        "momentumnet, memory mode": MomentumNet(list(model.branches), gamma=0.9, use_backprop=False),
        "mfx, gamma=0": mfx.momentumize(model, gamma=0.0),
        "mfx, float": mfx.momentumize(model, gamma=0.9, arithmetic="float"),
        "mfx, exact": mfx.momentumize(model, gamma=0.9),
    }


def step(forward: Forward, x: Tensor) -> None:
    """One training step without the optimizer."""
    forward(x).sum().backward()


def memory(forward: Forward, x: Tensor, parameters: Sequence[Tensor]) -> tuple[float, float]:
    """Units alive after the forward pass, and at the peak."""
    unit = x.numel() * x.element_size()
    with ActivationMeter(exclude=[x, *parameters]) as meter:
        y = forward(x)
        after = meter.live
        y.sum().backward()
    return after / unit, meter.peak / unit


class Flops(TorchDispatchMode):
    """Counts by torch's own formulas; its FlopCounterMode also tracks modules, which momentumnet does not survive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its work."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(forward: Forward, x: Tensor) -> int:
    """Floating-point operations of a training step."""
    with Flops() as counter:
        step(forward, x)
    return counter.total


def times(forwards: dict[str, Forward], x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a step; the methods take turns, so a change of the machine's speed hits all."""
    measured: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            start = time.perf_counter()
            step(forward, x)
            measured[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in measured.items()}


def compare(batch: int, depth: int, rounds: int) -> list[Row]:
    """All methods at one size."""
    torch.manual_seed(0)
    model = Residual(depth)
    forwards = methods(model)
    x = torch.randn(batch, WIDTH, requires_grad=True)
    parameters = [p for forward in forwards.values() if isinstance(forward, nn.Module) for p in forward.parameters()]
    for parameter in set(parameters):
        parameter.register_post_accumulate_grad_hook(_free)
    for forward in forwards.values():
        step(forward, x)  # what is done once, at the first call, is no part of a step
    work = {name: flops(forward, x) for name, forward in forwards.items()}
    kept = {name: memory(forward, x, parameters) for name, forward in forwards.items()}
    seconds = times(forwards, x, rounds)
    return [
        Row(name, batch, depth, *kept[name], work[name] / work["plain"], seconds[name] / seconds["plain"])
        for name in forwards
    ]


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| method | batch | depth | after forward | peak | FLOPs | time |", "|---|--:|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.method} | {row.batch} | {row.depth} | {row.after_forward:.1f} | {row.peak:.1f} "
        f"| {row.flops:.2f} | {row.time:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch size, fewer repetitions: under a minute")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one needs an idle machine")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = [(batch, depth) for batch in (4096, 256) for depth in (32, 64)]
    rounds = 9
    if options.quick:
        sizes, rounds = [(4096, 32), (4096, 64)], 3
    if options.tiny:
        sizes, rounds = [(8, 8)], 1
    rows: list[Row] = []
    for batch, depth in tqdm(sizes, unit="size"):
        rows += compare(batch, depth, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
