"""Time of a training step of real models: plain, checkpointed block by block, and momentumized.

    python examples/benchmarks/speed.py --quick

Models of torchvision, timm and transformers with random weights: forward, a sum, backward; no optimizer. The methods
take turns and start from the same random numbers; times are medians, as ratios to plain training, next to the peak of
activation memory and the work. Theory: a second forward pass makes 4/3 of the work. ``torch.utils.checkpoint`` does
not run again what is not needed at the end of a block, and keeps a block's input where momentum keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mfx
from examples.benchmarks.command import on_threads, parser_of, write_results

Built = tuple[nn.Module, dict[str, Any]]
METHODS: dict[str, Any] = {
    "plain": "plain",
    "checkpoint": "checkpoint",
    "mfx, float": {"gamma": 0.9, "arithmetic": "float"},
    "mfx, exact": "momentum",
}


@dataclass(frozen=True)
class Size:
    """The sizes of the inputs."""

    batch: int
    pixels: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """One method on one model; all but the seconds relative to plain training."""

    model: str
    method: str
    seconds: float
    time: float
    peak: float
    flops: float
    to_checkpoint: float


def torchvision_model(name: str, size: Size) -> Built:
    """An image classifier of torchvision."""
    from torchvision import models

    return models.get_model(name), {"x": torch.randn(size.batch, 3, size.pixels, size.pixels)}


def timm_model(name: str, size: Size) -> Built:
    """An image classifier of timm."""
    import timm

    model = timm.create_model(name, img_size=size.pixels)
    return model, {"x": torch.randn(size.batch, 3, size.pixels, size.pixels)}


def gpt2(layers: int, width: int, size: Size) -> Built:
    """A decoder with learned positions, as GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, n_positions=size.tokens, vocab_size=4096, **ends
    )
    return GPT2LMHeadModel(config), _tokens(size)


def llama(layers: int, width: int, size: Size) -> Built:
    """A decoder with rotary positions and gated branches, as Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3, "num_attention_heads": width // 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=4096, **sizes)), _tokens(size)


def _tokens(size: Size) -> dict[str, Any]:
    # Without a cache, which is for generating text, and of which checkpointing would make a second copy.
    return {"input_ids": torch.randint(0, 4096, (size.batch, size.tokens)), "use_cache": False}


FULL: dict[str, Callable[[Size], Built]] = {
    "ResNet-50": partial(torchvision_model, "resnet50"),
    "ResNet-101": partial(torchvision_model, "resnet101"),
    "ResNet-152": partial(torchvision_model, "resnet152"),
    "ViT-S/16": partial(timm_model, "vit_small_patch16_224"),
    "ViT-B/16": partial(timm_model, "vit_base_patch16_224"),
    "ConvNeXt-T": partial(torchvision_model, "convnext_tiny"),
    "Swin-T": partial(torchvision_model, "swin_t"),
    "GPT-2-like, 12 x 768": partial(gpt2, 12, 768),
    "Llama-like, 12 x 768": partial(llama, 12, 768),
}
QUICK: dict[str, Callable[[Size], Built]] = {
    "ResNet-50": partial(torchvision_model, "resnet50"),
    "ViT-S/16": partial(timm_model, "vit_small_patch16_224"),
    "GPT-2-like, 6 x 256": partial(gpt2, 6, 256),
    "Llama-like, 6 x 256": partial(llama, 6, 256),
}
TINY: dict[str, Callable[[Size], Built]] = {
    "ResNet-18": partial(torchvision_model, "resnet18"),
    "GPT-2-like, 2 x 64": partial(gpt2, 2, 64),
}


def measure(name: str, build: Callable[[Size], Built], size: Size, rounds: int, device: torch.device) -> list[Row]:
    """All methods on one model."""
    torch.manual_seed(0)
    model, inputs = build(size)
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    args = (inputs.pop("x"),) if "x" in inputs else ()
    found = mfx.profile(model.to(device), *args, against=METHODS, repeats=rounds, progress=False, **inputs)
    rows = {row.name: row for row in found.rows}
    plain, checkpoint = rows["plain"], rows["checkpoint"]
    return [
        Row(
            name,
            method,
            row.seconds,
            row.seconds / plain.seconds,
            row.peak_bytes / plain.peak_bytes,
            row.flops / plain.flops,
            row.seconds / checkpoint.seconds,
        )
        for method, row in rows.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | method | time | of checkpoint | peak memory | FLOPs | s |", "|---|---|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.model} | {row.method} | {row.time:.2f} | {row.to_checkpoint:.2f} | {row.peak:.2f} | {row.flops:.2f} "
        f"| {row.seconds:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time against memory, a marker for each model, a colour for each method."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours = dict(zip(METHODS, ("#444444", "#d9822b", "#2f9e60", "#2563c9"), strict=True))
    markers = dict(zip(dict.fromkeys(row.model for row in rows), "osD^v<>ph", strict=False))
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150, facecolor="white")
    axes = figure.add_subplot()
    for row in rows:
        axes.plot(row.peak, row.time, markers[row.model], color=colours[row.method], markersize=8)
    axes.set_xlabel("peak activation memory, of plain training")
    axes.set_ylabel("time of a training step, of plain training")
    axes.grid(alpha=0.25)
    keys = [Line2D([], [], linewidth=4, color=colour, label=method) for method, colour in colours.items()]
    keys += [
        Line2D([], [], linestyle="", marker=marker, color="#888888", label=model) for model, marker in markers.items()
    ]
    axes.legend(handles=keys, frameon=False, fontsize=8)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    parser = parser_of(__doc__, quick="four models, small inputs")
    parser.add_argument("--models", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--batch", type=int, help="batch size (default 2)")
    parser.add_argument("--rounds", type=int, help="steps to take the median of (default 3)")
    options = parser.parse_args(argv)
    models, size, rounds = FULL, Size(options.batch or 2, 224, 256), options.rounds or 3
    if options.quick:
        models, size = QUICK, Size(options.batch or 2, 96, 128)
    if options.tiny:
        models, size, rounds = TINY, Size(2, 32, 8), 1
    chosen = {name: build for name, build in models.items() if not options.models or name in options.models}
    if not chosen:
        parser.error(f"--models: of {', '.join(models)}")
    with on_threads(options.threads):
        rows = [
            row
            for name, build in tqdm(chosen.items(), unit="model")
            for row in measure(name, build, size, rounds, options.device)
        ]
    print(table(rows))
    write_results(__file__, options, rows)
    if options.plot is not None:
        plot(rows, options.plot)
    return rows


if __name__ == "__main__":
    main()
