"""mfx as a backend of torch.compile: compile time, time of a training step and memory, beside what else there is.

    python examples/compile_pipeline.py

``torch.compile(model, backend="mfx", options={"gamma": 0.9, "inner": "inductor"})`` rewrites the chains in the graph of
TorchDynamo, and has the inner backend compile the branches of the steps, each structure once, and what lies around the
chains. So what the inner backend compiles does not grow with depth. Three minutes on one core, of which compilers take
most. Memory is measured by torch.profiler: under an `mfx.ActivationMeter`, as under any mode that sees every
operation, torch.compile runs the model as it was, without its backend.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import mfx

GAMMA = 0.9
WIDTH, TOKENS = 128, 64


class Block(nn.Module):
    """The feed-forward step of a pre-norm transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x + f(x), (batch, tokens, width)."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def network(depth: int) -> nn.Sequential:
    """Blocks between two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(depth)), nn.Linear(WIDTH, 1))


def backend(inner: str) -> Callable[[nn.Module], nn.Module]:
    """Compile by mfx and an inner backend."""
    return lambda model: torch.compile(model, backend="mfx", options={"gamma": GAMMA, "inner": inner})


PIPELINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "inductor": torch.compile,
    "momentumize": lambda model: mfx.momentumize(model, gamma=GAMMA),
    "mfx, eager inside": backend("eager"),
    "mfx, inductor inside": backend("inductor"),
}


@dataclass(frozen=True)
class Row:
    """One way to run a model of some depth.

    Attributes:
        compilation: seconds of the first training step beyond those of later ones.
        step: seconds of a training step, the median.
        kept: bytes of activations alive between forward and backward pass.
        loss: of the first step.
    """

    pipeline: str
    depth: int
    compilation: float
    step: float
    kept: int
    loss: float


def measure(pipeline: str, depth: int, batch: int, steps: int, bar: tqdm) -> Row:
    """Compiles a network and trains it for some steps."""
    torch.compiler.reset()
    model = PIPELINES[pipeline](network(depth))
    x = torch.randn(batch, TOKENS, WIDTH)
    seconds, losses = [], []
    for _ in range(1 + steps):
        start = time.perf_counter()
        loss = model(x).square().mean()
        loss.backward()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        bar.update()
    step = statistics.median(seconds[1:])
    return Row(pipeline, depth, max(seconds[0] - step, 0.0), step, kept_by(model, x), losses[0])


def kept_by(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass leaves for the backward pass, by the profiler, which sees into compiled code."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(x).square().mean()
    del loss  # not before
    return sum(event.self_cpu_memory_usage for event in profiled.events())


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = ["| pipeline | depth | compilation, s | step, ms | kept, MiB |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {row.pipeline} | {row.depth} | {row.compilation:.1f} | {1000 * row.step:.0f} | {row.kept / 2**20:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Compile time, step time and memory by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained", dpi=150)
    titles = {"compilation": "compilation, s", "step": "training step, s", "kept": "kept for the backward pass, MiB"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for pipeline in dict.fromkeys(row.pipeline for row in rows):
            chosen = [row for row in rows if row.pipeline == pipeline]
            unit = 2**20 if name == "kept" else 1
            axes.plot(
                [row.depth for row in chosen], [getattr(row, name) / unit for row in chosen], "o-", label=pipeline
            )
        axes.set_title(title)
        axes.set_xlabel("blocks")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the example; returns a row for each pipeline and depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("compile_pipeline.png"), help="where to save the plot")
    parser.add_argument("--json", type=Path, help="where to save the numbers")
    parser.add_argument("--pipelines", nargs="+", choices=list(PIPELINES), default=list(PIPELINES))
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    options = parser.parse_args(argv)

    rows = []
    with tqdm(total=len(options.pipelines) * len(options.depths) * (1 + options.steps), unit="step") as bar:
        for pipeline in options.pipelines:
            for depth in options.depths:
                bar.set_description(f"{pipeline}, {depth} blocks")
                rows.append(measure(pipeline, depth, options.batch, options.steps, bar))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    plot(rows, options.png)
    return rows


if __name__ == "__main__":
    main()
