"""Peak and work of a settled training step: what mfx keeps against checkpoints and against torch.compile's budget.

    python examples/benchmarks/plans.py --quick

An MLP, a ViT, U-Nets with added and with joined skips, a ResNet: forward, a sum, backward. Bytes are those of
``mfx.ActivationMeter``, FLOPs those of matrix products, convolutions and attention, both of the eighth step. A
checkpoint is around every innermost residual block; of transformers around every layer, too. torch.compile's budget is
its partitioner's, whose graphs run operation by operation, so that the same bytes are counted; its share is the one
with the fewest FLOPs of those whose peak is at most the checkpoint's, else the one with the lowest peak.

A row of mfx loses if it breaks one of these:

* γ = 0: neither the peak nor the FLOPs are above the checkpoint's by more than half a percent, also where what lies
  between the chains may be recomputed, too, and the checkpoint's peak, and that much more, is the memory budget.
  Without a budget what may be recomputed is: then the peak alone counts;
* γ = 0.9: the peak is at most that of γ = 0 and two states of the widest chain, FLOPs are at most 1.34 of plain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import mfx
from examples.benchmarks import nets
from examples.benchmarks.command import on_threads, parser_of, write_results
from mfx.engine.memory.flops import FlopCounter

WITH_MORE = {
    "all recomputed": {"recompute": "all"},
    "all recomputed, checkpoint's peak as budget": {"recompute": "all", "memory_budget": "{peak} B"},
}
SHARES = (0.4, 0.2, 0.1)
TOLERANCE = 1.005
MOST_FLOPS = 1.34


@dataclass(frozen=True)
class Row:
    """One method on one network.

    Attributes:
        model: the network.
        method: how it is trained.
        peak: the most bytes alive at once.
        to_plain: the peak, relative to plain training.
        flops: relative to plain training.
        loses: what the row exceeds of ``"peak"`` and ``"FLOPs"``; ``""`` if nothing, or if it is not one of mfx.
    """

    model: str
    method: str
    peak: int
    to_plain: float
    flops: float
    loses: str = ""


@dataclass(frozen=True)
class Cost:
    """Peak bytes and floating-point operations of a step."""

    peak: int
    flops: int


Made = tuple[Callable[[], nn.Module], tuple[int, ...]]  # a network and the shape of its input

FULL: dict[str, Made] = {
    "MLP": (partial(nets.mlp, 24, 64), (512, 64)),
    "ViT": (partial(nets.vit, 6, 64), (8, 3, 32, 32)),
    "U-Net, added skips": (partial(nets.unet, 16, 4, added=True), (2, 3, 32, 32)),
    "U-Net, joined skips": (partial(nets.unet, 16, 4, added=False), (2, 3, 32, 32)),
    "ResNet": (partial(nets.resnet, 4, 16), (4, 3, 32, 32)),
}
TINY: dict[str, Made] = {
    "MLP": (partial(nets.mlp, 6, 16), (64, 16)),
    "U-Net, added skips": (partial(nets.unet, 4, 1, added=True), (1, 3, 16, 16)),
}


def settled(forward: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], x: Tensor) -> Cost:
    """Return what the eighth of eight steps takes; plans are decided, and corrected, in those before."""
    for _ in range(7):
        forward(x).sum().backward()
    with mfx.ActivationMeter(exclude=[x, *parameters]) as meter, FlopCounter() as counter:
        forward(x).sum().backward()
    return Cost(meter.peak, counter.flops)


def checkpointed(model: nn.Module, blocks: Callable[[nn.Module], Sequence[nn.Module]]) -> nn.Module:
    """Return a copy with ``torch.utils.checkpoint`` around some of its modules."""
    model = copy.deepcopy(model)
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def partitioned(model: nn.Module, share: float, x: Tensor) -> Cost:
    """Return what torch.compile's partitioner leaves at this share of its activation memory budget."""
    from functorch.compile import aot_module, min_cut_rematerialization_partition, nop
    from torch._functorch import config

    model = copy.deepcopy(model)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None  # it would save them, changed
    with config.patch(activation_memory_budget=share):
        net = aot_module(model, fw_compiler=nop, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition)
        return settled(net, model.parameters(), x)


def compiled(model: nn.Module, x: Tensor, limit: int) -> tuple[str, Cost]:
    """Return of the shares the one that computes least below a peak, else the one with the lowest, and its name."""
    costs = {share: partitioned(model, share, x) for share in SHARES}
    fitting = {share: cost for share, cost in costs.items() if cost.peak <= limit * TOLERANCE}
    order = (lambda share: costs[share].flops) if fitting else (lambda share: costs[share].peak)
    share = min(fitting or costs, key=order)
    return f"torch.compile, budget {share:g}", costs[share]


def two_states(net: nn.Module) -> int:
    """Return the bytes of x and v, twice, of the chain where they take most."""
    widest = 0
    for chain in mfx.explain(net).chains:
        assert chain.storage is not None, "the net was called"
        as_integers = chain.arithmetic == "exact" and chain.storage.policy == "states"
        state = sum(2 * math.prod(s.shape) * (8 if as_integers else s.dtype.itemsize) for s in chain.storage.streams)
        widest = max(widest, state)
    return 2 * widest


def exceeded(cost: Cost, peak: float, flops: float = math.inf) -> str:
    """Return which of the bounds a cost is above."""
    found = [name for name, is_above in (("peak", cost.peak > peak), ("FLOPs", cost.flops > flops)) if is_above]
    return " and ".join(found)


def compare(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], *, compiling: bool) -> list[Row]:
    """All methods on one network."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)

    def measured(net: nn.Module) -> Cost:
        return settled(net, net.parameters(), x)

    def momentum(**options: Any) -> tuple[nn.Module, Cost]:
        net = mfx.momentumize(copy.deepcopy(model), **options)
        return net, measured(net)

    plain = measured(copy.deepcopy(model))
    by_block = measured(checkpointed(model, nets.innermost))
    found: list[tuple[str, Cost, str]] = [("plain", plain, ""), ("checkpoint, every block", by_block, "")]
    if nets.layers(model):
        found.append(("checkpoint, every layer", measured(checkpointed(model, nets.layers)), ""))
    if compiling:
        found.append((*compiled(model, x, by_block.peak), ""))

    def below_checkpoint(cost: Cost) -> str:
        return exceeded(cost, TOLERANCE * by_block.peak, TOLERANCE * by_block.flops)

    _, unchanged = momentum(gamma=0.0)
    found.append(("mfx, gamma=0", unchanged, below_checkpoint(unchanged)))
    budget = int(TOLERANCE * by_block.peak)
    for what, options in WITH_MORE.items():
        _, cost = momentum(gamma=0.0, **{key: value.format(peak=budget) for key, value in options.items()})
        loses = below_checkpoint(cost) if "memory_budget" in options else exceeded(cost, TOLERANCE * by_block.peak)
        found.append((f"mfx, gamma=0, {what}", cost, loses))
    for arithmetic in ("exact", "float"):
        net, cost = momentum(gamma=0.9, arithmetic=arithmetic)
        bounds = unchanged.peak + two_states(net), MOST_FLOPS * plain.flops
        found.append((f"mfx, {arithmetic}", cost, exceeded(cost, *bounds)))
    return [
        Row(name, method, cost.peak, cost.peak / plain.peak, cost.flops / plain.flops, loses)
        for method, cost, loses in found
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| network | method | peak, KiB | to plain | FLOPs | loses |", "|---|---|--:|--:|--:|---|"]
    lines += [
        f"| {row.model} | {row.method} | {row.peak / 1024:.0f} | {row.to_plain:.3f} | {row.flops:.3f} | {row.loses} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    parser = parser_of(__doc__, quick="nothing compiled", draws=False, on_device=False)
    options = parser.parse_args(argv)
    sizes = TINY if options.tiny else FULL
    rows: list[Row] = []
    with on_threads(1):
        for name, (make, shape) in tqdm(sizes.items(), unit="network"):
            rows += compare(name, make, shape, compiling=not options.quick)
    print(table(rows))
    write_results(__file__, options, rows)
    return rows


if __name__ == "__main__":
    main()
