"""Trains a byte-level GPT on Python sources: plain, with momentum, annealed, and with random signs (`mfx.BDIA`).

    python -m examples.train_code_model                 # small, on a CPU
    python -m examples.train_code_model --size large --device cuda

The text is on every machine with this project: sources of packages that it installs, split by file. Every variant
starts from the same weights and sees the same batches; three seeds. Validation bits per byte are those of the model as
it is used: momentum networks keep their γ, those with random signs are the plain model. One JSON file per run, so that
a script that was stopped goes on; the table and the plot are made of the files. Memory is that of the first step.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from tqdm import tqdm

import mfx
from examples.runs import Runs, spread

PACKAGES = ("networkx", "sympy", "jinja2", "fsspec", "torch.nn", "torch.optim", "torch.distributions")
MAGNITUDES = {"BDIA 1/8": 1 / 8, "BDIA 1/4": 1 / 4, "BDIA 1/2": 1 / 2}
VARIANTS = ("plain", "gamma 0.9", "annealed to 0.9", *MAGNITUDES)


@dataclass(frozen=True)
class Size:
    """A model and its training."""

    layers: int
    width: int
    heads: int
    context: int  # bytes
    batch: int
    steps: int
    every: int  # steps between two validations
    lr: float


SIZES = {
    "tiny": Size(layers=2, width=16, heads=2, context=16, batch=2, steps=3, every=2, lr=1e-3),
    "small": Size(layers=8, width=64, heads=4, context=64, batch=16, steps=500, every=100, lr=2e-3),
    "medium": Size(layers=12, width=128, heads=4, context=128, batch=16, steps=4000, every=200, lr=2e-3),
    "large": Size(layers=24, width=768, heads=12, context=512, batch=32, steps=20_000, every=1000, lr=6e-4),
}


class Block(nn.Module):
    """Causal attention and a perceptron, each behind a normalisation and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        """Return the values that each byte takes from those before it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after the block."""
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A language model of bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, 256)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits of the bytes that follow, (batch, context, 256)."""
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sources(packages: Sequence[str] = PACKAGES) -> tuple[Tensor, Tensor]:
    """Return the bytes of the packages' Python files: those to train on, and every tenth file, to validate on."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for package in packages:
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec else None
        assert places, f"{package} is not installed"
        root = Path(next(iter(places)))
        for path in sorted(root.rglob("*.py")):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            is_unseen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0  # the same files everywhere
            parts[is_unseen].append(path.read_bytes() + b"\n")
    train, unseen = (torch.frombuffer(bytearray(b"".join(parts[key])), dtype=torch.uint8) for key in (False, True))
    print(f"{len(parts[False])} files of {len(train) / 1e6:.2f} MB to train on, {len(parts[True])} of "
          f"{len(unseen) / 1e6:.2f} MB to validate on")  # fmt: skip
    return train, unseen


def excerpts(text: Tensor, size: Size, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """Return a batch of excerpts, and the bytes that follow each of theirs."""
    starts = torch.randint(len(text) - size.context - 1, (size.batch, 1), generator=generator)
    batch = text[starts + torch.arange(size.context + 1)].long().to(device)
    return batch[:, :-1], batch[:, 1:]


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, size: Size, device: str) -> float:
    """Return the mean bits of an unseen byte, over the same excerpts at every call."""
    model.eval()
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(32):
        x, y = excerpts(text, size, generator, device)
        losses.append(cross_entropy(model(x).flatten(0, 1), y.flatten()).item())
    model.train()
    return sum(losses) / len(losses) / math.log(2)


def make(variant: str, model: nn.Module, size: Size) -> tuple[nn.Module, Callable[[], None]]:
    """Return the net of a variant, and what to call after each step of the optimizer."""
    if variant == "plain":
        return model, lambda: None
    if variant in MAGNITUDES:
        return mfx.momentumize(model, gamma=mfx.BDIA(MAGNITUDES[variant])), lambda: None
    net = mfx.momentumize(model, gamma=0.9)
    if variant == "gamma 0.9":
        return net, lambda: None
    scheduler = mfx.GammaScheduler(net, mfx.schedule.cosine(max(1, size.steps * 7 // 10), end=0.9))
    return net, scheduler.step


def train(variant: str, seed: int, size: Size, texts: tuple[Tensor, Tensor], device: str) -> dict[str, Any]:
    """Train one model from the seed's weights, and return its validation over steps."""
    torch.manual_seed(seed)
    net, after_step = make(variant, GPT(size).to(device), size)
    optimizer = torch.optim.AdamW(net.parameters(), size.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, size.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * t / size.steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    steps, bits = [0], [bits_per_byte(net, texts[1], size, device)]
    torch.manual_seed(seed)
    for step in tqdm(range(1, size.steps + 1), desc=f"{variant}, seed {seed}", unit="step"):
        x, y = excerpts(texts[0], size, generator, device)
        cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        after_step()
        if step % size.every == 0 or step == size.steps:
            steps.append(step)
            bits.append(bits_per_byte(net, texts[1], size, device))
    return {"variant": variant, "seed": seed, "steps": steps, "bits": bits, "size": asdict(size),
            "bytes_of_text": [len(text) for text in texts]}  # fmt: skip


def memory(variant: str, size: Size, texts: tuple[Tensor, Tensor], device: str) -> dict[str, Any]:
    """Return the bytes of activations at the peak of a training step."""
    net, _ = make(variant, GPT(size).to(device), size)
    x, y = excerpts(texts[0], size, torch.Generator().manual_seed(0), device)
    with mfx.ActivationMeter(exclude=net.parameters()) as meter:
        cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
    return {"variant": variant, "peak": meter.peak}


def by_variant(runs: Sequence[dict[str, Any]]) -> dict[str, tuple[list[dict[str, Any]], float]]:
    """Return the trainings of each variant that has some, with the MiB at the peak of its steps."""
    peaks = {run["variant"]: run["peak"] / 2**20 for run in runs if "peak" in run}
    trained = {variant: [run for run in runs if run["variant"] == variant and "bits" in run] for variant in VARIANTS}
    return {variant: (alike, peaks[variant]) for variant, alike in trained.items() if alike}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the results as Markdown: bits per byte of unseen files, mean and standard deviation over seeds."""
    found = by_variant(runs)
    first, _ = next(iter(found.values()))
    size, megabytes = Size(**first[0]["size"]), [f"{count / 1e6:.1f} MB" for count in first[0]["bytes_of_text"]]
    each, middle = size.batch * size.context, first[0]["steps"][len(first[0]["steps"]) // 2]
    about = (
        f"{2 * size.layers} residual steps of width {size.width}; {size.steps} steps of {each} bytes, from "
        f"{megabytes[0]} of sources; {megabytes[1]} of other files to validate on."
    )
    lines = [
        about,
        "",
        f"| variant | seeds | bits per byte, at the end | at step {middle} | activations at the peak, MiB |",
        "|---|--:|--:|--:|--:|",
    ]
    for variant, (alike, peak) in found.items():
        then, ends = ([run["bits"][run["steps"].index(step)] for run in alike] for step in (middle, size.steps))
        lines.append(f"| {variant} | {len(alike)} | {spread(ends)} | {spread(then)} | {peak:.1f} |")
    return "\n".join(lines)


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw validation over steps, means with the range of the seeds, and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for variant, (alike, peak) in by_variant(runs).items():
        bits = torch.tensor([run["bits"] for run in alike])
        (line,) = left.plot(alike[0]["steps"], bits.mean(0), label=variant)
        left.fill_between(alike[0]["steps"], bits.amin(0), bits.amax(0), color=line.get_color(), alpha=0.2)
        right.barh(variant, peak)
    left.set_title("bits per byte of unseen files")
    left.set_xlabel("step")
    left.set_yscale("log")
    left.legend()
    right.invert_yaxis()
    right.set_title("activations at the peak, MiB")
    figure.savefig(path)


def _slug(variant: str) -> str:
    return variant.replace(" ", "-").replace("/", "_")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the example; returns all runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="of model and training (default small)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant (default 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--runs", type=Path, help="folder of the runs' files (default train_code_model/SIZE)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results of all runs there")
    parser.add_argument("--png", type=Path, default=Path("train_code_model.png"), help="where to save the plot")
    options = parser.parse_args(argv)

    size, runs = SIZES[options.size], Runs(options.runs or Path("train_code_model") / options.size)
    texts = sources()
    for seed in range(options.seeds):
        for variant in options.variants:
            runs.run(f"{_slug(variant)}-{seed}", lambda v=variant, s=seed: train(v, s, size, texts, options.device))
    for variant in options.variants:
        runs.run(f"memory-{_slug(variant)}", lambda v=variant: memory(v, size, texts, options.device))
    print(table(runs.all()))
    if options.json:
        runs.write(options.json, f"python -m examples.train_code_model --size {options.size}")
    plot(runs.all(), options.png)
    return runs.all()


if __name__ == "__main__":
    main()
