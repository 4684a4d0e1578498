"""The cost of exact arithmetic: in a training step of a ViT-S, in a step of the recurrence alone, and in stored bits.

    python examples/benchmarks/arithmetic.py --quick

Three tables. The training step is of an encoder of width 384, 12 layers, 197 tokens, batch 4: forward and backward, no
optimizer. Alone, a step of the recurrence is set against the time in which its bytes could be copied: every tensor of
the state read once and written once. The store's bits are counted; they depend on γ and depth only. All methods of a
table take turns, times are medians, and ratios are medians of the ratios in each turn.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mfx
from examples.benchmarks.command import on_threads, parser_of, write_results
from mfx.engine.arithmetic import ARITHMETICS, State
from mfx.engine.arithmetic.digit_store import DigitStore, bytes_stored
from mfx.options.gamma import Gamma

GAMMA = 0.9
# Bytes and dense FLOPs per second that NVIDIA states for an H100 SXM.
_PEAKS = (("float32", 3.35e12, 67e12), ("TF32", 3.35e12, 494e12), ("bfloat16", 3.35e12, 989e12))
Run = Callable[[], object]


class Layer(nn.Module):
    """A pre-norm transformer layer: two residual steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over the tokens of x, (batch, tokens, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A stack of layers, as it is usually written."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Training:
    """A training step: seconds, and as a ratio to plain training and to mfx in float arithmetic."""

    method: str
    seconds: float
    to_plain: float
    to_float: float


@dataclass(frozen=True)
class Alone:
    """One step of the recurrence without its branch; ``bound`` is how long copying its bytes takes."""

    arithmetic: str
    direction: str
    seconds: float
    bytes: int
    bound: float


@dataclass(frozen=True)
class Bits:
    """The store of digits per element: bytes, and bits per step past the first word, beside log2(1/γ)."""

    gamma: float
    depth: int
    bytes: int
    per_step: float | None
    ideal: float


def turns(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round; the runs take turns, so a change of the machine's speed hits all."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in tqdm(range(-1, rounds), unit="round", leave=False):
        for name, run in runs.items():
            seconds = _timed(run, device)
            if round_ >= 0:  # what is done once, in the first call, is not part of a step
                measured[name].append(seconds)
    return measured


def _timed(run: Run, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training(shape: tuple[int, int, int], depth: int, rounds: int, device: torch.device) -> list[Training]:
    """Every method on the same encoder."""
    torch.manual_seed(0)
    model = Encoder(shape[-1], depth).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)

    def checkpointed(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    forwards: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": model,
        "checkpoint, every layer": checkpointed,
        "mfx, float": mfx.momentumize(model, gamma=GAMMA, arithmetic="float"),
        "mfx, exact": mfx.momentumize(model, gamma=GAMMA),
        "mfx, exact, memory_budget=1.0": mfx.momentumize(model, gamma=GAMMA, memory_budget=1.0),
    }
    runs: dict[str, Run] = {name: lambda f=f: f(x).sum().backward() for name, f in forwards.items()}
    found = turns(runs, rounds, device)
    return [
        Training(name, statistics.median(s), _ratio(s, found["plain"]), _ratio(s, found["mfx, float"]))
        for name, s in found.items()
    ]


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


class Recurrence:
    """A chain's state that is moved back and forth between steps 1 and 2 by a branch that always gives the same."""

    def __init__(self, arithmetic: type[State], shape: tuple[int, ...], device: torch.device) -> None:
        self.y, self.gamma = torch.randn(shape, device=device), Gamma.of(GAMMA)
        self.state = arithmetic.start(torch.randn(shape, device=device), None, reversible=True)
        self.forward()

    def forward(self) -> None:
        """One step."""
        self.state.advance(self.y, "residual", self.gamma)

    def back(self) -> None:
        """Undo it."""
        self.state.retreat_x()
        self.state.retreat_v(self.y, "residual", self.gamma)


# Bytes per element that must be read and written. Exact: x, v and the store in eight bytes each, read and written, and
# back, v is read once more, for x, and x, for v. Float: x and v in four. Both read the branch's value and write the
# stream, which in float is x itself.
_BYTES = {("exact", "forward"): 56, ("exact", "back"): 72, ("float", "forward"): 20, ("float", "back"): 24}


def alone(shape: tuple[int, int, int], rounds: int, device: torch.device) -> list[Alone]:
    """The recurrence in both arithmetics and directions, against copying."""
    numel = math.prod(shape)
    source = torch.zeros(3 * numel, dtype=torch.float64, device=device)  # as large as an exact state
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source)}
    for name in ("float", "exact"):
        recurrence = Recurrence(ARITHMETICS[name], shape, device)
        runs[f"{name} forward"], runs[f"{name} back"] = recurrence.forward, recurrence.back
    found = {name: statistics.median(seconds) for name, seconds in turns(runs, 5 * rounds, device).items()}
    bandwidth = 2 * source.nbytes / found["copy"]
    return [
        Alone(name, direction, found[f"{name} {direction}"], size * numel, size * numel / bandwidth)
        for (name, direction), size in _BYTES.items()
    ]


def bits(gamma: Gamma, depths: Sequence[int]) -> list[Bits]:
    """The store of one chain at these depths."""
    store, one = DigitStore(), torch.zeros(1, dtype=torch.int64)
    ideal, rows = math.log2(1 / gamma.value), []
    spills: list[int] = []
    for depth in range(1, max(depths) + 1):
        # The first step multiplies nothing, but a later one can.
        store.before_multiply(gamma.numerator, gamma.denominator, one)
        if store.history[-1][1]:
            spills.append(depth)
        if depth in depths:
            limbs = sum(limb.nbytes for limb in store.limbs)
            # From one filled limb to another, so that none is half full.
            between = 8 * (limbs - store.limbs[0].nbytes) / (spills[-1] - spills[0]) if len(spills) > 1 else None
            stored = bytes_stored(gamma.numerator, gamma.denominator, depth)
            rows.append(Bits(gamma.value, depth, stored, between, ideal))
    return rows


def table(steps: Sequence[Training], recurrences: Sequence[Alone], store: Sequence[Bits]) -> str:
    """Return the three tables in Markdown."""
    lines = ["| training step | ms | to plain | to float |", "|---|--:|--:|--:|"]
    lines += [f"| {r.method} | {1e3 * r.seconds:.0f} | {r.to_plain:.2f} | {r.to_float:.2f} |" for r in steps]
    lines += ["", "| one step alone | ms | MB | GB/s | copying the same bytes, ms | times that |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {r.arithmetic}, {r.direction} | {1e3 * r.seconds:.2f} | {r.bytes / 1e6:.1f} "
        f"| {r.bytes / 1e9 / r.seconds:.1f} | {1e3 * r.bound:.2f} | {r.seconds / r.bound:.1f} |"
        for r in recurrences
    ]
    lines += ["", "| γ | depth | store, bytes per element | bits per step past the word | log2(1/γ) | ratio |"]
    lines += ["|--:|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {r.gamma:g} | {r.depth} | {r.bytes} | "
        + (
            f"{r.per_step:.4f} | {r.ideal:.4f} | {r.per_step / r.ideal:.3f} |"
            if r.per_step
            else f"– | {r.ideal:.4f} | – |"
        )
        for r in store
    ]
    return "\n".join(lines)


def _verdict(steps: Sequence[Training], recurrences: Sequence[Alone]) -> str:
    by_name = {r.method: r for r in steps}
    exact, light = by_name["mfx, exact"], by_name["mfx, float"]
    extra = sum(r.seconds if r.arithmetic == "exact" else -r.seconds for r in recurrences)
    least = sum(r.bound if r.arithmetic == "exact" else -r.seconds for r in recurrences)
    return (
        f"exact: {exact.to_float:.2f} times float, {exact.to_plain:.2f} times plain; a step there and back takes "
        f"{1e3 * extra:.2f} ms more than in float, and {1e3 * least:.2f} ms more if it ran at the speed of a copy. The "
        f"second forward pass alone makes float {light.to_plain:.2f} times plain."
    )


def roofline(shape: tuple[int, int, int], depth: int) -> str:
    """Return what exact arithmetic adds to a step in float where every byte and FLOP goes at a device's peak."""
    model, x = Encoder(shape[-1], depth), torch.zeros(shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    flops = 4 * counter.get_total_flops()  # forward, again, and back, which is twice a forward
    sizes = {name: sum(size for (other, _), size in _BYTES.items() if other == name) for name in ("float", "exact")}
    extra = 2 * depth * (sizes["exact"] - sizes["float"]) * math.prod(shape)
    shares = [
        f"{100 * extra / bandwidth / (flops / speed):.0f} % in {precision}" for precision, bandwidth, speed in _PEAKS
    ]
    return (
        f"At the peak of an H100 (3.35 TB/s; {flops / 1e9:.0f} GFLOP, and {extra / 1e6:.0f} MB more than in float), "
        f"exact arithmetic would add {', '.join(shares)}, if a step were one kernel. That falls as 1/width."
    )


def main(argv: Sequence[str] | None = None) -> tuple[list[Training], list[Alone], list[Bits]]:
    """Print the tables."""
    options = parser_of(__doc__, quick="fewer rounds", draws=False).parse_args(argv)
    shape, depth, rounds = (4, 197, 384), 12, 15
    gammas, depths = (0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999), (4, 16, 64, 256, 1000, 10000)
    if options.quick:
        rounds = 3
    if options.tiny:
        shape, depth, rounds, gammas, depths = (1, 4, 64), 8, 1, (0.5, 0.9), (16, 256)
    with on_threads(options.threads):
        steps = training(shape, depth, rounds, options.device)
        recurrences = alone(shape, rounds, options.device)
    store = [row for gamma in gammas for row in bits(Gamma.of(gamma), depths)]
    print(table(steps, recurrences, store))
    print("\n" + _verdict(steps, recurrences))
    print("\n" + roofline(shape, depth))
    write_results(__file__, options, {"training": steps, "alone": recurrences, "store": store})
    return steps, recurrences, store


if __name__ == "__main__":
    main()
