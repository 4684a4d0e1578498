"""Trains a vit_pytorch ViT and a torchvision ResNet on handwritten digits, as they are and momentumized.

    python examples/quickstart.py

Same initial weights, same batches, same optimizer. What differs is one line, ``mfx.momentumize(model, gamma=0.9)``;
what to look at is the memory. A minute of one CPU core; the first table comes after a third of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm
from vit_pytorch import ViT

import mfx

SEED = 0
TRAIN_SIZE = 1437  # of 1797 digits; the rest is the test set


@dataclass(frozen=True)
class Task:
    """A model to train, and how."""

    name: str
    build: Callable[[], nn.Module]
    steps: int
    lr: float
    batch: int = 128


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    model: str
    variant: str
    accuracy: float  # on the test set, in [0, 1]
    peak: int  # bytes of activations in one training step
    seconds: float  # per training step, the median


def resnet(blocks: Sequence[int]) -> nn.Module:
    """torchvision's ResNet, its first convolution made for small grey images."""
    model = ResNet(BasicBlock, list(blocks), num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=3, padding=1, bias=False)
    return model


def vit(depth: int) -> nn.Module:
    """vit_pytorch's ViT on four patches of 4 by 4 pixels."""
    return ViT(
        image_size=8, patch_size=4, channels=1, num_classes=10, dim=64, depth=depth, heads=4, dim_head=16, mlp_dim=128
    )


TASKS = (
    Task("ViT, 16 layers", lambda: vit(16), steps=66, lr=1e-3),
    Task("ResNet, 20 blocks", lambda: resnet([12, 6, 1, 1]), steps=55, lr=5e-4),
)
TINY = (
    Task("ViT, 2 layers", lambda: vit(2), steps=2, lr=1e-3, batch=16),
    Task("ResNet, 5 blocks", lambda: resnet([2, 1, 1, 1]), steps=2, lr=2e-3, batch=16),
)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, shuffled: images (1797, 1, 8, 8) in [0, 1] and labels (1797,)."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, in a new order every epoch."""
    while True:
        for index in torch.randperm(len(labels)).split(size)[: len(labels) // size]:
            yield images[index], labels[index]


def train(model: nn.Module, task: Task, images: Tensor, labels: Tensor, title: str) -> float:
    """Trains in place; returns the median time of a step in seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=task.steps)
    times = []
    model.train()
    with tqdm(total=task.steps, desc=title, unit="step") as bar:
        for _, (x, y) in zip(range(task.steps), batches(images, labels, task.batch), strict=False):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    return statistics.median(times)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images the model gets right."""
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def peak_activations(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The most bytes of activations alive at once in a training step."""
    model.train()
    with mfx.ActivationMeter(exclude=model.parameters()) as meter:
        cross_entropy(model(x), y).backward()
    return meter.peak


def measure(task: Task, variant: str, transform: Callable[[nn.Module], nn.Module]) -> Row:
    """Trains ``transform`` of the task's model from the seed's weights and measures it."""
    torch.manual_seed(SEED)
    model = transform(task.build())
    images, labels = digits()
    seconds = train(model, task, images[:TRAIN_SIZE], labels[:TRAIN_SIZE], f"{task.name}, {variant}")
    score = accuracy(model, images[TRAIN_SIZE:], labels[TRAIN_SIZE:])
    return Row(task.name, variant, score, peak_activations(model, images[: task.batch], labels[: task.batch]), seconds)


def table(rows: Sequence[Row]) -> str:
    """The rows side by side, with what momentum costs and gains."""
    lines = [f"{'':32}{'accuracy':>10}{'activations':>14}{'time/step':>12}"]
    for plain, momentum in zip(rows[::2], rows[1::2], strict=True):
        lines += [
            f"{row.model:20}{row.variant:12}{row.accuracy:10.1%}{row.peak / 2**20:10.1f} MiB{row.seconds * 1e3:9.0f} ms"
            for row in (plain, momentum)
        ]
        memory, duration = momentum.peak / plain.peak, momentum.seconds / plain.seconds
        lines.append(f"{'':20}{'ratio':12}{'':10}{memory:13.2f}×{duration:11.2f}×")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy, memory and time side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained", dpi=150)
    titles = {"accuracy": "accuracy", "peak": "activations at the peak, MiB", "seconds": "seconds per training step"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for variant, offset in (("plain", -0.2), ("momentum", 0.2)):
            chosen = [getattr(row, name) / (2**20 if name == "peak" else 1) for row in rows if row.variant == variant]
            axes.bar([i + offset for i in range(len(chosen))], chosen, 0.4, label=variant)
        axes.set_xticks(range(len(chosen)), dict.fromkeys(row.model for row in rows))
        axes.set_title(title)
    axes.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the example; returns a plain and a momentum row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.9, help="the momentum (default 0.9)")
    parser.add_argument("--steps", type=int, help="training steps for each model, instead of enough to learn")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads (default 1: these models gain little from more)"
    )
    parser.add_argument("--png", type=Path, default=Path("quickstart.png"), help="where to save the plot")
    parser.add_argument("--tiny", action="store_true", help="two steps of two small models, to see that it runs")
    options = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    printed = 0
    for task in TINY if options.tiny else TASKS:
        chosen = replace(task, steps=options.steps or task.steps)
        rows.append(measure(chosen, "plain", lambda model: model))
        rows.append(measure(chosen, "momentum", lambda model: mfx.momentumize(model, gamma=options.gamma)))
        lines = table(rows).splitlines()
        print("\n".join(lines[printed:]), flush=True)
        printed = len(lines)
    torch.set_num_threads(threads)
    plot(rows, options.png)
    return rows


if __name__ == "__main__":
    main()
