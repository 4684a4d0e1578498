"""The cost of capturing and rewriting a model, against its size and against ``torch.fx`` capturing it.

    python examples/benchmarks/passes.py --quick

Stacks of residual blocks x + Linear(GELU(Linear(LayerNorm(x)))), and ResNets. ``momentumize`` copies the tree of
modules, traces with stack traces, finds and checks the chains, cuts out the steps and inserts the calls, for one graph.
It is set against ``torch.fx``'s tracer alone, with stack traces recorded as mfx records them, and without. Processor
time, least of the repetitions, in turns; the exponent is that of the straight line through the logarithms.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx, nn
from tqdm import tqdm

import mfx
from examples.benchmarks.command import parser_of, write_results

WIDTH = 4
MAX_RATIO, MAX_EXPONENT = 2.0, 1.15  # what is aimed at: ResNet-152, and stacks


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        return x + self.down(self.act(self.up(self.norm(x))))


@dataclass(frozen=True)
class Row:
    """One model; seconds of processor time."""

    model: str
    blocks: int
    nodes: int
    symbolic_trace: float
    with_stack_traces: float
    momentumize: float

    @property
    def ratio(self) -> float:
        """To tracing with stack traces."""
        return self.momentumize / self.with_stack_traces


def trace(model: nn.Module, *, stack_traces: bool) -> fx.Graph:
    """By torch.fx's own tracer."""
    tracer = fx.Tracer()
    tracer.record_stack_traces = stack_traces
    return tracer.trace(model)


def seconds(function: Callable[[], object]) -> float:
    """Processor time of one call, with nothing to collect from before."""
    gc.collect()
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(name: str, blocks: int, model: nn.Module, rounds: int) -> Row:
    """One model."""
    ways: list[Callable[[], object]] = [
        lambda: trace(model, stack_traces=False),
        lambda: trace(model, stack_traces=True),
        lambda: mfx.momentumize(model),
    ]
    least = [math.inf] * len(ways)
    for _ in range(rounds):
        least = [min(before, seconds(way)) for before, way in zip(least, ways, strict=True)]
    return Row(name, blocks, len(trace(model, stack_traces=False).nodes), *least)


def resnet(name: str) -> tuple[str, int, nn.Module]:
    """A ResNet of torchvision, and how many blocks it has."""
    from torchvision import models
    from torchvision.models.resnet import BasicBlock, Bottleneck

    model = models.get_model(name)
    return name, sum(isinstance(module, BasicBlock | Bottleneck) for module in model.modules()), model


def exponent(rows: Sequence[Row], column: str) -> float:
    """Of the power of the number of nodes that the seconds in a column grow with: least squares in the logarithms."""
    x = [math.log(row.nodes) for row in rows]
    y = [math.log(getattr(row, column)) for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, and what they come to."""
    lines = [
        "| model | blocks | nodes | symbolic_trace, s | with stack traces, s | momentumize, s | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.model} | {row.blocks} | {row.nodes} | {row.symbolic_trace:.3f} | {row.with_stack_traces:.3f} "
        f"| {row.momentumize:.3f} | {row.ratio:.2f} |"
        for row in rows
    ]
    stacks = [row for row in rows if row.model == "stack"]
    mine, theirs = exponent(stacks, "momentumize"), exponent(stacks, "with_stack_traces")
    lines += [
        "",
        f"Seconds grow with the nodes to the power of {mine:.2f} (aim: {MAX_EXPONENT} at most); tracing: {theirs:.2f}.",
        f"Ratio of {rows[-1].model}: {rows[-1].ratio:.2f} (aim: {MAX_RATIO} at most).",
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds against nodes, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150, facecolor="white")
    axes = figure.add_subplot()
    stacks = [row for row in rows if row.model == "stack"]
    nodes = [row.nodes for row in stacks]
    axes.plot(nodes, [row.momentumize for row in stacks], "o-", color="#2563c9", label="momentumize")
    axes.plot(nodes, [row.with_stack_traces for row in stacks], "o-", color="#444444", label="trace, stack traces")
    axes.plot(nodes, [row.symbolic_trace for row in stacks], "o-", color="#999999", label="trace")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("nodes of the graph")
    axes.set_ylabel("processor time, s")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    options = parser_of(__doc__, quick="to 1000 blocks", on_device=False).parse_args(argv)
    sizes, names, rounds = [62, 125, 250, 500, 1000, 2000, 4000], ["resnet18", "resnet50", "resnet152"], 3
    if options.quick:
        sizes, rounds = [62, 250, 1000], 2
    if options.tiny:
        sizes, names, rounds = [4, 8], ["resnet18"], 1
    rows = [
        measure("stack", size, nn.Sequential(*(Block() for _ in range(size))), rounds)
        for size in tqdm(sizes, unit="size")
    ]
    rows += [measure(*resnet(name), rounds) for name in tqdm(names, unit="ResNet")]
    print(table(rows))
    write_results(__file__, options, rows)
    if options.plot is not None:
        plot(rows, options.plot)
    return rows


if __name__ == "__main__":
    main()
