"""Trains digits classifiers and fine-tunes a pretrained encoder with random signs of γ, and evaluates the plain models.

    python -m examples.random_signs digits       # the ResNet and the ViT of quickstart.py
    python -m examples.random_signs minilm       # the encoder of finetune_huggingface.py, from its published weights
    python -m examples.random_signs digits minilm --json examples/benchmarks/results/random_signs.json

`mfx.BDIA` draws γ = ±magnitude in training and is the model itself in evaluation; beside it plain training, γ = 0 and
momentum. One JSON file per run, so that a script that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mfx
from examples.runs import Runs, spread

SIGNS = {"BDIA 1/8": mfx.BDIA(1 / 8), "BDIA 1/4": mfx.BDIA(1 / 4)}
DIGITS = {"plain": None, "gamma 0.9": 0.9, **SIGNS, "BDIA 1/2": mfx.BDIA(1 / 2)}
STEPS = {"ResNet, 20 blocks": 55, "ViT, 16 layers": 88}  # more than the quickstart's
MINILM = {"plain": None, "gamma 0": 0.0, "gamma 1/64": 1 / 64, **SIGNS}


def rewritten(model: nn.Module, gamma: Any) -> nn.Module:
    """Return a net on a model's weights; the model itself for None."""
    return model if gamma is None else mfx.momentumize(model, gamma=gamma)


def digits(runs: Runs, seeds: int, *, tiny: bool) -> None:
    """Train the quickstart's models."""
    from examples import quickstart

    images, labels = quickstart.digits()
    split = quickstart.TRAIN_SIZE

    def measure(task: quickstart.Task, variant: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        net = rewritten(task.build(), DIGITS[variant])
        quickstart.train(net, task, images[:split], labels[:split], f"{task.name}, {variant}, seed {seed}")
        accuracy = quickstart.accuracy(net, images[split:], labels[split:])
        return {"model": task.name, "variant": variant, "seed": seed, "accuracy": accuracy}

    def memory(task: quickstart.Task, variant: str) -> dict[str, Any]:
        net = rewritten(task.build(), DIGITS[variant])
        peak = quickstart.peak_activations(net, images[: task.batch], labels[: task.batch])
        return {"model": task.name, "variant": variant, "peak": peak}

    def is_possible(task: quickstart.Task, variant: str) -> bool:
        """An activation follows the sums of a ResNet: magnitudes below 1/3."""
        return not (task.name.startswith("ResNet") and variant == "BDIA 1/2")

    longer = [replace(task, steps=STEPS[task.name]) for task in quickstart.TASKS]
    tasks = quickstart.TINY if tiny else longer
    pairs = [(task, variant) for task in tasks for variant in DIGITS if is_possible(task, variant)]
    for seed in range(seeds):
        for task, variant in pairs:
            runs.run(_name(task.name, variant, seed), lambda t=task, v=variant, s=seed: measure(t, v, s))
    for task, variant in pairs:
        runs.run(_name(task.name, variant, "memory"), lambda t=task, v=variant: memory(t, v))


def minilm(runs: Runs, seeds: int, *, tiny: bool) -> None:
    """Fine-tune MiniLM on the iris data in words."""
    from tqdm import tqdm

    from examples import finetune_huggingface as example

    (train, test), steps, layers = example.flowers(), 1 if tiny else 60, 2 if tiny else 6

    def measure(variant: str, seed: int, steps: int) -> example.Row:
        net = rewritten(example.classifier(layers), MINILM[variant])
        with tqdm(total=steps, desc=f"{variant}, seed {seed}", unit="step") as bar:
            return example.finetune(variant, net, train, test, steps, bar, seed=seed + 1)

    def score(variant: str, seed: int) -> dict[str, Any]:
        accuracy = measure(variant, seed, steps).accuracy
        return {"model": "MiniLM", "variant": variant, "seed": seed, "accuracy": accuracy}

    def memory(variant: str) -> dict[str, Any]:
        return {"model": "MiniLM", "variant": variant, "peak": measure(variant, 0, 1).peak}

    for seed in range(seeds):
        for variant in MINILM:
            runs.run(_name("MiniLM", variant, seed), lambda v=variant, s=seed: score(v, s))
    for variant in MINILM:
        runs.run(_name("MiniLM", variant, "memory"), lambda v=variant: memory(v))


def _name(model: str, variant: str, what: int | str) -> str:
    return f"{model.partition(',')[0]}-{variant.replace(' ', '-').replace('/', '_')}-{what}"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return accuracies, means and standard deviations over seeds, and memory, as Markdown."""
    lines = ["| model | variant | seeds | accuracy, % | activations at the peak, MiB |", "|---|---|--:|--:|--:|"]
    peaks = {(run["model"], run["variant"]): run["peak"] / 2**20 for run in runs if "peak" in run}
    trained = _trained(runs)
    for model in dict.fromkeys(run["model"] for run in trained):
        for variant in {**MINILM, **DIGITS}:
            if alike := [run for run in trained if (run["model"], run["variant"]) == (model, variant)]:
                score = spread([100 * run["accuracy"] for run in alike], ".1f")
                lines.append(f"| {model} | {variant} | {len(alike)} | {score} | {peaks[model, variant]:.1f} |")
    return "\n".join(lines)


def _trained(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in runs if "accuracy" in run]


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the accuracy of every run."""
    from matplotlib.figure import Figure

    runs = _trained(runs)
    models = list(dict.fromkeys(run["model"] for run in runs))
    figure = Figure(figsize=(4.5 * len(models), 3.5), layout="constrained", dpi=150)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        alike = [run for run in runs if run["model"] == model]
        axes.plot([run["variant"] for run in alike], [100 * run["accuracy"] for run in alike], "o", alpha=0.6)
        axes.set_title(f"{model}: % of unseen ones right")
        axes.tick_params("x", rotation=20)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the example; returns all runs."""
    experiments: dict[str, Callable[..., None]] = {"digits": digits, "minilm": minilm}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=experiments)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each variant (default 3)")
    parser.add_argument("--tiny", action="store_true", help="a step or two of small models, to see that it runs")
    parser.add_argument("--runs", type=Path, default=Path("random_signs"), help="folder of the runs' files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results of all runs there")
    parser.add_argument("--png", type=Path, default=Path("random_signs.png"), help="where to save the plot")
    options = parser.parse_args(argv)

    runs = Runs(options.runs)
    for name in options.experiments:
        experiments[name](runs, options.seeds, tiny=options.tiny)
    print(table(runs.all()))
    if options.json:
        runs.write(options.json, " ".join(["python -m examples.random_signs", *options.experiments]))
    plot(runs.all(), options.png)
    return runs.all()


if __name__ == "__main__":
    main()
