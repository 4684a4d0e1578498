"""A short tutorial: what Momentum Transformers save.

    python examples/memory_transformers.py

A transformer layer adds twice to its input: x + attention(x), then x + mlp(x). To train it, autograd keeps what both
branches computed, in every layer, so memory grows with depth. A Momentum Transformer runs the same layers as

    v ← γ v + (1 - γ) f(x),    x ← x + v

which can be run backwards: the state before a layer is found from the state after it, and nothing has to be kept.

Three transformers, written by three groups who did not have this in mind, are momentumized here as they are: torch's
own encoder and decoder, vit_pytorch's ViT, Hugging Face's BERT. For each the script measures the activations that one
training step keeps at worst, at several depths, prints a table, and draws it. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mfx

WIDTH, HEADS = 64, 4
MIB = 2**20

# Step 1: models. Any will do; mfx looks at the graph of the forward pass, not at names. Each function here returns a
# transformer with ``depth`` layers and the inputs of one call.


def torch_transformer(depth: int, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An encoder and a decoder, half of the layers each. A decoder's layer adds three times, not twice."""
    half = depth // 2
    model = nn.Transformer(WIDTH, HEADS, half, half, 4 * WIDTH, batch_first=True)
    return model, (torch.randn(batch, 48, WIDTH), torch.randn(batch, 48, WIDTH))


def vit(depth: int, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A vision transformer on 32 x 32 pixels: 64 tokens and one for the class."""
    from vit_pytorch import ViT

    model = ViT(
        image_size=32, patch_size=4, num_classes=10, dim=WIDTH, depth=depth, heads=HEADS, dim_head=16, mlp_dim=4 * WIDTH
    )
    return model, (torch.randn(batch, 3, 32, 32),)


def bert(depth: int, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """BERT, of random weights, on 64 tokens. Its layers normalise after they add; that is no hindrance."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "vocab_size": 1000}
    return BertModel(BertConfig(num_hidden_layers=depth, **sizes)), (torch.randint(0, 1000, (batch, 64)),)


MODELS: dict[str, Callable[[int, int], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "torch.nn.Transformer": torch_transformer,
    "vit_pytorch ViT": vit,
    "Hugging Face BERT": bert,
}

# Step 2: what to compare. Each of these trains the same weights. Checkpointing, the usual remedy, keeps the input of
# every layer and computes the layer a second time in the backward pass. Momentum computes it a second time, too, but
# finds its input instead of keeping it. "exact" finds the very same bits, for which it notes what a division by γ would
# lose: log2(1/0.9) = 0.15 bits per element and step. "float" notes nothing (but a state now and then), and is off by
# rounding.

VARIANTS = {
    "plain": "plain",
    "checkpoint": "checkpoint",
    "momentum, exact": "momentum",
    "momentum, float": {"gamma": 0.9, "arithmetic": "float"},
}
COLOURS = dict(zip(VARIANTS, ("#444444", "#d9822b", "#2563c9", "#2f9e60"), strict=True))


@dataclass(frozen=True)
class Point:
    """One training step: bytes of activations kept between forward and backward, and at worst; and its work."""

    model: str
    depth: int
    variant: str
    kept: int
    peak: int
    flops: int


# Step 3: measure. mfx.profile makes a training step of each variant on copies of the model, counts every byte that
# torch allocates in it, and leaves the model as it was. To train for good, the one line to write is
#
#     model = mfx.momentumize(model, gamma=0.9)
#
# and everything else of the training script stays as it is: same parameters, same checkpoints, same optimizer.


def measure(models: Sequence[str], depths: Sequence[int], batch: int) -> tuple[list[Point], dict[str, mfx.Profile]]:
    """These models at all depths; and of each model the profile of the deepest."""
    points, deepest = [], {}
    with tqdm(total=len(models) * len(depths), unit="model") as bar:
        for name in models:
            for depth in depths:
                torch.manual_seed(0)
                model, inputs = MODELS[name](depth, batch)
                profile = mfx.profile(model, *inputs, against=VARIANTS, repeats=1, progress=False)
                points += [
                    Point(name, depth, row.name, row.kept_bytes, row.peak_bytes, row.flops) for row in profile.rows
                ]
                deepest[name] = profile
                bar.update()
    return points, deepest


# Step 4: look. At a fixed depth the table gives the memory and what is paid for it in work: a second forward pass, so
# at most 1.33 times as much. What matters more is the last column: what one more layer costs.


def slope(points: Sequence[Point]) -> float:
    """Bytes of peak memory per layer, between the shallowest and the deepest model."""
    first, *_, last = sorted(points, key=lambda point: point.depth)
    return (last.peak - first.peak) / (last.depth - first.depth)


def table(points: Sequence[Point]) -> str:
    """The deepest models as a Markdown table."""
    deepest = max(point.depth for point in points)
    lines = [
        f"| {deepest} layers | variant | kept, MiB | peak, MiB | of plain | FLOPs | KiB per further layer |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(point.model for point in points):
        rows = {point.variant: point for point in points if (point.model, point.depth) == (name, deepest)}
        for variant, row in rows.items():
            same = [point for point in points if (point.model, point.variant) == (name, variant)]
            lines.append(
                f"| {name} | {variant} | {row.kept / MIB:.2f} | {row.peak / MIB:.2f} "
                f"| {row.peak / rows['plain'].peak:.2f} | {row.flops / rows['plain'].flops:.2f} "
                f"| {slope(same) / 1024:.1f} |"
            )
    return "\n".join(lines)


def plot(points: Sequence[Point], profiles: dict[str, mfx.Profile], path: Path) -> None:
    """Above: peak memory against depth. Below: the memory in the course of one step of the deepest model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(profiles), 7), layout="constrained", dpi=150, facecolor="white")
    rows = figure.subplots(2, len(profiles), squeeze=False)
    for name, above, below in zip(profiles, *rows, strict=True):
        for variant, colour in COLOURS.items():
            chosen = [point for point in points if (point.model, point.variant) == (name, variant)]
            depths, peaks = [point.depth for point in chosen], [point.peak / MIB for point in chosen]
            above.plot(depths, peaks, "o-", color=colour, label=variant, linewidth=2, markersize=4)
        for row in profiles[name].rows:
            where, live = zip(*row.timeline, strict=True)
            below.plot(where, [size / MIB for size in live], color=COLOURS[row.name], linewidth=1.5)
        above.set_title(name)
        above.set_xlabel("layers")
        below.set_xlabel(f"share of a step's operations, {max(depths)} layers")
        for axes in (above, below):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel("peak activation memory, MiB")
    rows[1][0].set_ylabel("activations alive, MiB")
    rows[0][0].legend(frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Point]:
    """Runs the tutorial; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 48], help="layers (default 4 to 48)")
    parser.add_argument("--batch", type=int, default=16, help="batch size (default 16)")
    parser.add_argument("--png", type=Path, default=Path("memory_transformers.png"), help="where to save the plot")
    parser.add_argument("--json", type=Path, help="where to save the numbers")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="two shallow depths and a small batch")
    options = parser.parse_args(argv)
    depths, batch = ([4, 8], 2) if options.quick else (sorted(options.depths), options.batch)

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    points, profiles = measure(options.models, depths, batch)
    torch.set_num_threads(threads)
    print(table(points))
    if options.json:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=1))
    plot(points, profiles, options.png)
    return points


if __name__ == "__main__":
    main()
