"""Fine-tunes a trained ResNet with γ taken from 0 to 0.9: it stays accurate on its way to a reversible network.

    python examples/anneal.py

A torchvision ResNet is trained on scikit-learn's handwritten digits as it is. Then it is trained on in three ways, from
the same weights on the same batches: plain; momentumized with γ = 0.9 at once, which is another function of these
weights; and with γ annealed from 0 by ``mfx.GammaScheduler``, so that the weights follow the function. What comes out
of the last two is the same kind of network. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

import mfx

GAMMA = 0.9
TRAIN_SIZE = 1437  # of 1797 digits; the rest is the test set
VARIANTS = {"plain": "plain", "fixed": "γ = 0.9 at once", "annealed": "γ from 0 to 0.9"}


@dataclass(frozen=True)
class Setting:
    """A setting: what is trained, and for how long."""

    blocks: tuple[int, int] = (8, 4)  # of 64 channels, of 128
    batch: int = 64
    pretraining: int = 66  # steps; an epoch has 22
    finetuning: int = 220
    annealing: int = 154  # of these, until γ is 0.9
    every: int = 11  # steps between two tests
    lr: float = 1e-3
    finetuning_lr: float = 2e-4


QUICK = Setting(blocks=(4, 1), batch=32, pretraining=44, finetuning=66, annealing=44, finetuning_lr=5e-4)


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    variant: str
    seed: int
    start: float  # accuracy on the test set after pretraining, of the plain network
    steps: tuple[int, ...]
    gammas: tuple[float, ...]
    accuracy: tuple[float, ...]  # on the test set, of the network at that step's γ


@dataclass(frozen=True)
class Data:
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,)."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for ever, in a new order every epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self.labels), generator=generator).split(size)[: len(self.labels) // size]:
                yield self.images[index], self.labels[index]


def digits(seed: int) -> tuple[Data, Data]:
    """scikit-learn's digits, shuffled: the training set and the test set."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]
    return Data(x[:TRAIN_SIZE], y[:TRAIN_SIZE]), Data(x[TRAIN_SIZE:], y[TRAIN_SIZE:])


def resnet(blocks: tuple[int, int]) -> nn.Module:
    """torchvision's ResNet for small grey images: another first convolution, and without the last two stages."""
    model = ResNet(BasicBlock, [*blocks, 1, 1], num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, kernel_size=3, padding=1, bias=False)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The fraction of images the model gets right."""
    model.eval()
    right = (model(data.images).argmax(1) == data.labels).float().mean().item()
    model.train()
    return right


def training(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], lr: float, steps: int, constant: int = 0
) -> Iterator[int]:
    """Trains in place; yields the number of steps done, from 1. After ``constant`` steps the rate goes to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (steps - step) / (steps - constant)))
    model.train()
    for step in range(1, steps + 1):
        x, y = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        yield step


def finetune(model: nn.Module, variant: str, seed: int, setting: Setting, bar: tqdm) -> Run:
    """Trains a copy of the model on."""
    train, test = digits(seed)
    start = accuracy(model, test)
    net, constant = deepcopy(model), {"plain": 0.0, "fixed": GAMMA}
    scheduler = None
    if variant != "plain":
        net = mfx.momentumize(net, gamma=GAMMA)
    if variant == "annealed":
        scheduler = mfx.GammaScheduler(net, mfx.schedule.cosine(setting.annealing, start=0.0, end=GAMMA))
    batches = train.batches(setting.batch, seed + 1)
    points = [(0, constant.get(variant, 0.0), accuracy(net, test))]
    for step in training(net, batches, setting.finetuning_lr, setting.finetuning, setting.annealing):
        gamma = constant.get(variant, 0.0)
        if scheduler:
            scheduler.step()
            gamma = scheduler.get_last_gamma()
        if step % setting.every == 0 or step == setting.finetuning:
            points.append((step, gamma, accuracy(net, test)))
            bar.set_postfix(accuracy=f"{points[-1][2]:.1%}")
        bar.update()
    return Run(variant, seed, start, *map(tuple, zip(*points, strict=True)))


def run(seed: int, setting: Setting, bar: tqdm) -> list[Run]:
    """Pretrains once and fine-tunes in every way."""
    torch.manual_seed(seed)
    model = resnet(setting.blocks)
    bar.set_description(f"seed {seed}, pretraining")
    batches = digits(seed)[0].batches(setting.batch, seed)
    for _ in training(model, batches, setting.lr, setting.pretraining):
        bar.update()
    runs = []
    for variant, name in VARIANTS.items():
        bar.set_description(f"seed {seed}, {name}")
        runs.append(finetune(model, variant, seed, setting, bar))
    return runs


def table(runs: Sequence[Run]) -> str:
    """Test accuracies, means over seeds, as Markdown."""
    lines = ["| fine-tuning | before | first step | worst | last third |", "|---|--:|--:|--:|--:|"]
    for variant, name in VARIANTS.items():
        chosen = [run for run in runs if run.variant == variant]
        numbers = (
            statistics.mean(run.start for run in chosen),
            statistics.mean(run.accuracy[0] for run in chosen),
            statistics.mean(min(run.accuracy) for run in chosen),
            statistics.mean(last_third(run) for run in chosen),
        )
        lines.append(f"| {name} | " + " | ".join(f"{number:.1%}" for number in numbers) + " |")
    return "\n".join(lines)


def last_third(run: Run) -> float:
    """Mean accuracy over the last third of the tests: less noisy than the last one."""
    return statistics.mean(run.accuracy[-(-len(run.accuracy) * 2 // 3) :])


def plot(runs: Sequence[Run], path: Path) -> None:
    """Errors by step, the mean over seeds and their range, above γ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for (variant, name), colour in zip(VARIANTS.items(), ("0.35", "tab:orange", "tab:blue"), strict=True):
        chosen = [run for run in runs if run.variant == variant]
        steps, columns = chosen[0].steps, list(zip(*(run.accuracy for run in chosen), strict=True))
        means = [100 - 100 * statistics.mean(column) for column in columns]
        top.plot(steps, means, color=colour, label=name, linewidth=2)
        low, high = [100 - 100 * max(column) for column in columns], [100 - 100 * min(column) for column in columns]
        top.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        bottom.plot(steps, chosen[0].gammas, color=colour, linewidth=2)
    seeds = len({run.seed for run in runs})
    top.set_ylabel("errors on unseen digits, %")
    top.set_yscale("symlog", linthresh=1)
    top.set_yticks((0, 1, 3, 10, 30, 100), ("0", "1", "3", "10", "30", "100"))
    top.set_ylim(0, 100)
    top.set_title(f"Fine-tuning a trained ResNet to γ = {GAMMA} (mean and range of {seeds} seeds)", fontsize=11)
    top.legend(loc="upper right")
    top.grid(alpha=0.3)
    bottom.set_ylabel("γ")
    bottom.set_ylim(-0.05, 1)
    bottom.set_xlabel("fine-tuning step")
    bottom.grid(alpha=0.3)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Runs the example; returns a run for each seed and way of fine-tuning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--png", type=Path, default=Path("anneal.png"), help="where to save the plot")
    parser.add_argument("--json", type=Path, help="where to save the numbers")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="a small network and few steps")
    options = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    setting = QUICK if options.quick else Setting()
    with tqdm(total=options.seeds * (setting.pretraining + len(VARIANTS) * setting.finetuning), unit="step") as bar:
        runs = [result for seed in range(options.seeds) for result in run(seed, setting, bar)]
    torch.set_num_threads(threads)
    print(table(runs))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in runs], indent=1))
    plot(runs, options.png)
    return runs


if __name__ == "__main__":
    main()
