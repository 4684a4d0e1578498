"""mfx and torch.compile: seconds to compile against depth, seconds per training step, bytes kept for the backward pass.

    python examples/benchmarks/compiled.py --quick

Vision transformers (torchvision's) under Inductor. Steps: all methods take turns in one process, one thread, medians.
Compile times and bytes of mfx, at two depths: a process of its own for each, with an empty cache; seconds from the
first call to the end of the first backward pass, less a later step; bytes that the forward pass allocates and leaves,
by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

import mfx
from examples.benchmarks.command import parser_of, write_results

Call = Callable[[Tensor], Tensor]
BASE = "checkpoint per block, compiled"


@dataclass(frozen=True)
class Size:
    """The sizes of the model and its inputs.

    Attributes:
        width: of the token vectors.
        image: edge in pixels, of patches of 8.
        batch: images per step.
        depths: encoder layers of the two models that are compared.
        repeats: timed steps.
    """

    width: int
    image: int
    batch: int
    depths: tuple[int, int]
    repeats: int


SIZES = {
    "tiny": Size(16, 16, 2, (2, 3), 1),
    "quick": Size(96, 64, 8, (6, 48), 5),
    "full": Size(384, 112, 4, (6, 48), 5),
}


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        method: how the model is trained.
        depths: layers of the shallow and the deep model.
        step_seconds: median, of the shallow model.
        compile_seconds: for the shallow and the deep model, if measured.
        kept_bytes: after the forward pass, of the shallow and the deep model, if measured.
    """

    method: str
    depths: tuple[int, int]
    step_seconds: float
    compile_seconds: tuple[float, float] | None = None
    kept_bytes: tuple[int, int] | None = None


def vit(size: Size, depth: int) -> VisionTransformer:
    """A vision transformer of that depth, the same at every call."""
    torch.manual_seed(0)
    heads = max(1, size.width // 32)
    return VisionTransformer(size.image, 8, depth, heads, size.width, 4 * size.width, num_classes=10)


def images(size: Size) -> Tensor:
    """A batch."""
    return torch.randn(size.batch, 3, size.image, size.image, generator=torch.Generator().manual_seed(1))


def with_checkpoints(model: VisionTransformer) -> VisionTransformer:
    """The model with every encoder layer under ``torch.utils.checkpoint``."""

    class Checkpointed(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)

    model.encoder.layers = nn.Sequential(*(Checkpointed(layer) for layer in model.encoder.layers))
    return model


METHODS: Mapping[str, Callable[[VisionTransformer], Call]] = {
    "plain, compiled": lambda model: torch.compile(model, fullgraph=True),
    BASE: lambda model: torch.compile(with_checkpoints(model), fullgraph=True),
    'backend="mfx", float': lambda model: torch.compile(
        model, fullgraph=True, backend="mfx", options={"arithmetic": "float"}
    ),
    'backend="mfx", exact': lambda model: torch.compile(model, fullgraph=True, backend="mfx"),
    "compile(momentumize), float": lambda model: torch.compile(
        mfx.momentumize(model, arithmetic="float"), fullgraph=True
    ),
    "compile(momentumize), exact": lambda model: torch.compile(mfx.momentumize(model), fullgraph=True),
    "momentumize, exact, not compiled": lambda model: mfx.momentumize(model),
}
AT_TWO_DEPTHS = ('backend="mfx", exact', "compile(momentumize), exact")


def step(call: Call, x: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    call(x).square().mean().backward()
    return time.perf_counter() - start


def kept(call: Call, x: Tensor) -> int:
    """Bytes that a forward pass allocates and leaves."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = call(x).square().mean()
    loss.backward()
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def measure_compile(method: str, size: Size, depth: int) -> dict[str, float]:
    """Seconds to compile and bytes kept, of one method at one depth; to be called in a fresh process."""
    call, x = METHODS[method](vit(size, depth)), images(size)
    first = step(call, x)
    later = min(step(call, x) for _ in range(2))
    return {"seconds": first - later, "bytes": kept(call, x)}


def in_process(method: str, size: str, depth: int) -> dict[str, float]:
    """`measure_compile` in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", method, str(depth)]
        command += [] if size == "full" else [f"--{size}"]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_steps(size: Size, depth: int) -> dict[str, float]:
    """Median seconds of a training step, by method; all take turns."""
    calls, x = {name: make(vit(size, depth)) for name, make in METHODS.items()}, images(size)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(size.repeats + 2):
        for name, call in calls.items():
            seconds = step(call, x)
            if repeat >= 2:  # before that, graphs are captured and compiled
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(name: str) -> list[Row]:
    """All there is to measure."""
    size = SIZES[name]
    steps = measure_steps(size, size.depths[0])
    rows = []
    for method, seconds in steps.items():
        if method not in AT_TWO_DEPTHS:
            rows.append(Row(method, size.depths, seconds))
            continue
        shallow, deep = (in_process(method, name, depth) for depth in size.depths)
        times = shallow["seconds"], deep["seconds"]
        rows.append(Row(method, size.depths, seconds, times, (int(shallow["bytes"]), int(deep["bytes"]))))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with ratios."""
    base = next(row for row in rows if row.method == BASE)
    shallow, deep = base.depths
    heads = ["method", "step, to checkpoint's", f"compile, {shallow} layers", f"{deep} layers", "ratio"]
    heads += [f"kept, {shallow} layers", f"{deep} layers", "ratio"]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        cells = [row.method, f"{row.step_seconds / base.step_seconds:.2f}"]
        if row.compile_seconds and row.kept_bytes:
            (a, b), (p, q) = row.compile_seconds, row.kept_bytes
            cells += [f"{a:.1f} s", f"{b:.1f} s", f"{b / a:.2f}"]
            cells += [f"{p / 2**20:.2f} MiB", f"{q / 2**20:.2f} MiB", f"{q / p:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the benchmark; returns one row per method."""
    parser = parser_of(__doc__, quick="small models", on_device=False, draws=False)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "DEPTH"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    name = "tiny" if options.tiny else "quick" if options.quick else "full"
    torch.set_num_threads(1)
    if options.one:
        method, depth = options.one
        print(json.dumps(measure_compile(method, SIZES[name], int(depth))))
        return []
    rows = measure(name)
    print(table(rows))
    write_results(__file__, options, rows)
    return rows


if __name__ == "__main__":
    main()
