"""Everything that a GPU decides, in ten minutes: is mfx right there, how fast is it, how much fits.

    python examples/benchmarks/gpu.py --json examples/benchmarks/results/gpu.json

On any device that torch has an accelerator for (CUDA, ROCm, XPU), else on the CPU, which ``--tiny`` is for. Sections in
the order of their importance:

* correctness: Triton's kernels against torch's operations in the tests' cases, gradients of nets bit for bit against
  kept activations, with dropout, BatchNorm, autocast, GradScaler, cudnn.benchmark and a captured CUDA graph;
* counts: launches, synchronisations and copies of a training step;
* roofline: what bandwidth and products allow on this device, by counted bytes;
* speed: peak and time of a step by every method, taking turns with plain training; without and with a compiler;
* fits: the largest batch or sequence in a device's memory.

Nothing that fails takes the rest down: every row is guarded, sections run in processes of their own, and the JSON is
written after every row. The models are torchvision's where it is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from examples.benchmarks.command import parser_of, write_results
from examples.benchmarks.on_gpu import correctness, counts, fits, roofline, speed
from examples.benchmarks.on_gpu.jobs import Job, Row, Section, Setting, run
from examples.benchmarks.on_gpu.kernels import refusal
from examples.benchmarks.on_gpu.machine import default_device, describe, memory_of
from examples.benchmarks.on_gpu.models import Model, models, small_models
from mfx.options.memory_budget import MemoryBudget

__all__ = ["Row", "main", "table"]


def _describe(found: dict[str, Any], setting: Setting) -> None:
    device = setting.where
    found.update(device=describe(device), torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip)
    found.update({name: version(name) for name in ("triton", "torchvision") if find_spec(name) is not None})
    found["GiB"] = round((memory_of(device) or 0) / 2**30, 1)
    found["kernels"] = refusal(device) or "triton"


def _machine(setting: Setting) -> list[Job]:
    return [Job("machine", "", partial(_describe, setting=setting), 60)]


def _predict(found: dict[str, Any], setting: Setting, model: Model) -> None:
    predicted = roofline.predict(model, roofline.chip(describe(setting.where)))
    found["chip"] = predicted.chip
    found.update({f"{method}, to plain": predicted.ratio(method) for method in predicted.seconds if method != "plain"})


def _predictions(setting: Setting) -> list[Job]:
    chosen = small_models()[:1] if setting.tiny else models()[:4]
    return [Job(model.name, "", partial(_predict, setting=setting, model=model), 60) for model in chosen]


def _beside_roofline(row: Row, rows: Sequence[Row]) -> Row:
    """Return a row of the section "speed" with what the roofline has said of its model and method, if it has."""
    for other in rows:
        if (row.section, other.section) == ("speed", "roofline") and other.case == row.case:
            predicted = other.values.get(f"{row.method}, to plain")
            return replace(row, values={**row.values, "roofline, to plain": predicted}) if predicted else row
    return row


SECTIONS = (
    Section("machine", 0.02, _machine),
    Section("correctness", 0.34, correctness.jobs),
    Section("counts", 0.1, counts.jobs),
    Section("roofline", 0.06, _predictions),
    Section("speed", 0.36, speed.jobs),
    Section("fits", 0.16, fits.jobs),
)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, a table for each section."""
    parts = []
    for section in dict.fromkeys(row.section for row in rows):
        of_section = [row for row in rows if row.section == section]
        columns = list(dict.fromkeys(name for row in of_section for name in row.values))
        heads = [section, "", *columns, "error", "took, s"]
        lines = [f"| {' | '.join(heads)} |", f"|---|---|{'--:|' * len(columns)}---|--:|"]
        for row in of_section:
            values = [_written(row.values.get(name)) for name in columns]
            cells = [row.case, row.method, *values, row.error or "", f"{row.seconds:.1f}"]
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the tables; write them as they grow."""
    parser = parser_of(__doc__, quick="less of everything", on_device=False, draws=False)
    parser.add_argument("--device", default=default_device(), help="default: the accelerator, else the CPU")
    parser.add_argument("--minutes", type=float, help="for all sections together (default 10)")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], metavar="SECTION")
    parser.add_argument("--memory", default="24GiB", help="that the largest step may take, where the device has more")
    parser.add_argument("--rounds", type=int, default=7, help="steps to take the median of (default 7)")
    parser.add_argument("--one-process", action="store_true", help="no process for each section: for a debugger")
    options = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that are the same at every run
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    memory = 2**20 if options.tiny else MemoryBudget.of(options.memory).size
    setting = Setting(options.device, options.tiny, 1 if options.tiny else options.rounds, memory)
    chosen = [section for section in SECTIONS if not options.only or section.name in options.only]
    seconds = 60 * (options.minutes or (1 if options.quick else 10))
    rows: list[Row] = []
    for measured in run(chosen, setting, seconds, apart=not options.one_process):
        row = _beside_roofline(measured, rows)
        rows.append(row)
        print(f"{row.section}: {row.case} {row.method}: {row.error or dict(row.values)}", file=sys.stderr, flush=True)
        write_results(__file__, options, rows)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
