"""Activation memory, work and time of one training step, for every way to train a deep residual network.

    python examples/benchmarks/memory.py --quick

Residual blocks x + Linear(GELU(Linear(LayerNorm(x)))), width 64, four times as wide inside. memcnn, revlib and revtorch
need two streams: theirs are both 64 wide, and the same branches add to them by turns, so that the work is the same (the
function is not). Memory is what torch's allocator hands out and gets back during a step, scratch included, compiled or
not, in units of one (batch, 64) float32 tensor; parameters are left out, and a parameter's gradient is freed as soon as
it is accumulated. Work is that of matrix products. Times are medians, as ratios to plain training, taken by turns.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import mfx
from examples.benchmarks.blocks import Residual
from examples.benchmarks.command import on_threads, parser_of, write_results
from examples.benchmarks.contenders import WIDTH, Forward, compiled, eager, step


@dataclass(frozen=True)
class Row:
    """One method at one size.

    Attributes:
        method: how the blocks are trained.
        batch: vectors per step.
        depth: blocks.
        after_forward: units alive between the forward and the backward pass, the output included.
        peak: units alive at worst.
        to_plain: peak, as a ratio to plain training.
        to_peer: peak, as a ratio to the smallest of any method but mfx.
        flops: relative to plain training.
        time: relative to plain training.
    """

    method: str
    batch: int
    depth: int
    after_forward: float
    peak: float
    to_plain: float
    to_peer: float
    flops: float
    time: float


def memory(forward: Forward, x: Tensor, parameters: Sequence[Tensor]) -> tuple[float, float]:
    """Units alive after the forward pass, and at the peak."""
    x.grad = None
    if x.is_cuda:
        with mfx.ActivationMeter(exclude=[x, *parameters]) as meter:
            y = forward(x)
            after = meter.live
            y.sum().backward()
        return after / x.nbytes, meter.peak / x.nbytes
    # Under the meter's dispatch mode nothing would be compiled; nor does it see a storage that is resized (memcnn).
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = forward(x)
        with record_function("forward done"):
            pass
        y.sum().backward()
    live = after = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "forward done":
            after = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return after / x.nbytes, peak / x.nbytes


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
    """Floating-point operations of a training step that is not compiled."""
    with Flops() as counter:
        step(forward, x)
    return counter.total


def compiled_flops(forward: Forward, x: Tensor) -> int:
    """The same of one that is; the profiler also counts a product that checkpoint stops before it is computed."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as seen:
        step(forward, x)
    products = ("aten::mm", "aten::addmm", "aten::bmm")
    return sum(event.flops() for event in seen.profiler.kineto_results.events() if event.name() in products)


def times(forwards: Mapping[str, Forward], x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a step; the methods take turns, so a change of the machine's speed hits all."""
    measured: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            start = time.perf_counter()
            step(forward, x)
            measured[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in measured.items()}


def compare(batch: int, depth: int, rounds: int, device: torch.device, *, compiling: bool = False) -> list[Row]:
    """All methods at one size."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Residual(depth, WIDTH).to(device)
    x = torch.randn(batch, WIDTH, device=device, requires_grad=True)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(_free)
    by_hand, by_compiler = eager(model, x), compiled(model) if compiling else {}
    forwards = {**by_hand, **by_compiler}
    for forward in forwards.values():
        step(forward, x)  # what is done once, at the first call, is not part of a step
    work = {name: flops(forward, x) for name, forward in by_hand.items()}
    work |= {name: compiled_flops(forward, x) for name, forward in by_compiler.items()}
    kept = {name: memory(forward, x, parameters) for name, forward in forwards.items()}
    seconds = times(forwards, x, rounds)
    peaks = {name: peak for name, (_, peak) in kept.items()}
    best = min(peak for name, peak in peaks.items() if "mfx" not in name)
    return [
        Row(
            name,
            batch,
            depth,
            *kept[name],
            peaks[name] / peaks["plain"],
            peaks[name] / best,
            work[name] / work["plain"],
            seconds[name] / seconds["plain"],
        )
        for name in forwards
    ]


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    heads = ["method", "batch", "depth", "after forward", "peak", "to plain", "to best peer", "FLOPs", "time"]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.method} | {row.batch} | {row.depth} | {row.after_forward:.1f} | {row.peak:.1f} | {row.to_plain:.3f} "
        f"| {row.to_peer:.2f} | {row.flops:.2f} | {row.time:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Peak memory against work, at the first of the sizes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained", dpi=150, facecolor="white")
    axes = figure.subplots()
    families = {"plain": "#444444", "checkpoint": "#d9822b", "torch.compile,": "#8a6d3b", "mfx": "#2563c9"}
    seen: dict[str, int] = {}
    for row in rows:
        if (row.batch, row.depth) != (rows[0].batch, rows[0].depth):
            continue
        family = next((name for name in families if name in row.method), "peer")
        seen[family] = seen.get(family, -1) + 1
        colour, marker = families.get(family, "#7b4bb7"), "osD^vP*X<>"[seen[family] % 10]
        axes.plot(row.flops, row.peak, marker, color=colour, markersize=7, alpha=0.8, label=row.method)
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs of a training step, relative to plain training")
    axes.set_ylabel(f"peak activation memory, in ({rows[0].batch}, {WIDTH}) tensors")
    axes.set_title(f"{rows[0].depth} residual blocks, batch {rows[0].batch}", fontsize=10)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    parser = parser_of(__doc__, quick="two sizes, once, nothing compiled")
    options = parser.parse_args(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's library tells of every start and stop
    sizes = [(batch, depth) for batch in (4096, 256) for depth in (32, 64)]
    rounds = 3
    if options.quick:
        sizes, rounds = [(2048, 32), (256, 64)], 1
    if options.tiny:
        sizes, rounds = [(8, 4)], 1
    rows: list[Row] = []
    with on_threads(options.threads):
        for batch, depth in tqdm(sizes, unit="size"):
            compiling = (batch, depth) == sizes[0] and not (options.quick or options.tiny)  # minutes
            rows += compare(batch, depth, rounds, options.device, compiling=compiling)
    print(table(rows))
    write_results(__file__, options, rows)
    if options.plot is not None:
        plot(rows, options.plot)
    return rows


if __name__ == "__main__":
    main()
