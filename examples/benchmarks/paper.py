"""The memory experiments of the momentum ResNet paper: ResNet-152 at 224 pixels, and the CIFAR ResNet of depth 1202.

    python examples/benchmarks/paper.py --quick

Bytes of activations at the peak of a training step, counted exactly (parameters, their gradients and the images left
out), at two batch sizes; in between and beyond, activations grow linearly with the batch. That gives the largest batch
whose activations fit into 32 GiB, and the ratio to plain training there. The paper (Sander, Ablin, Blondel, Peyré, ICML
2021) reports 2.1 times less memory for ResNet-152.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet152
from tqdm import tqdm

import mfx
from examples.benchmarks.command import on_threads, parser_of, write_results

ROOM = 32 * 2**30
METHODS: Mapping[str, dict[str, Any] | None] = {
    "plain": None,
    "mfx, exact": {},
    "mfx, float": {"arithmetic": "float"},
    'mfx, exact, recompute="all"': {"recompute": "all"},
    'mfx, float, recompute="all"': {"arithmetic": "float", "recompute": "all"},
}


class Block(nn.Module):
    """A basic block of a CIFAR ResNet."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        stride = out // width
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(width, out, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, h, w) to (batch, out, h', w')."""
        skip = x if self.shortcut is None else self.shortcut(x)
        return self.relu(self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + skip)


class CifarResNet(nn.Module):
    """He et al. (2016): three stages of n basic blocks, of width 16, 32 and 64; depth 6n + 2."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        widths = [(16, 16), (16, 32), (32, 64)]
        self.stages = nn.Sequential(
            *(nn.Sequential(Block(before, out), *(Block(out, out) for _ in range(n - 1))) for before, out in widths)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, 10)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        model: its name.
        method: how it was trained.
        batch: the larger batch that was measured.
        peak: bytes at the peak at that batch.
        less: plain training's peak over this one.
        each: bytes that one image more adds to the peak.
        less_each: what one image adds in plain training over that: the ratio at large batches.
        largest_batch: whose activations fit into 32 GiB.
    """

    model: str
    method: str
    batch: int
    peak: int
    less: float
    each: float
    less_each: float
    largest_batch: int


def step(net: nn.Module, images: Tensor) -> None:
    """One training step without the optimizer; a parameter's gradient is freed as soon as it is there."""
    net(images).sum().backward()


def peak(net: nn.Module, images: Tensor) -> int:
    """Bytes of activations at the worst moment of a step."""
    step(net, images)  # a net under a plan makes it in its first step
    with mfx.ActivationMeter(exclude=[images, *net.parameters(), *net.buffers()]) as meter:
        step(net, images)
    return meter.peak


def compare(name: str, make: Callable[[], nn.Module], size: int, batches: tuple[int, int]) -> list[Row]:
    """All methods on one model, at two batch sizes."""
    rows: list[Row] = []
    torch.manual_seed(0)
    model = make().train()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_free)
    for method, options in tqdm(METHODS.items(), desc=name, leave=False):
        net = model if options is None else mfx.momentumize(model, gamma=0.9, **options)
        small, large = (peak(net, torch.randn(batch, 3, size, size)) for batch in batches)
        each = (large - small) / (batches[1] - batches[0])
        fits = int((ROOM - large) / each + batches[1])
        plain = rows[0] if rows else None
        less, less_each = (plain.peak / large, plain.each / each) if plain else (1.0, 1.0)
        rows.append(Row(name, method, batches[1], large, less, each, less_each, fits))
    return rows


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | method | batch | peak, MiB | less than plain | MiB per image | less | largest batch in 32 GiB |"
    ]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    lines += [
        f"| {row.model} | {row.method} | {row.batch} | {row.peak / 2**20:.1f} | {row.less:.1f}× "
        f"| {row.each / 2**20:.2f} | {row.less_each:.1f}× | {row.largest_batch} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Print the table."""
    quick = "smaller images, depth 302 instead of 1202"
    options = parser_of(__doc__, quick=quick, on_device=False, draws=False).parse_args(argv)
    depth = 20 if options.tiny else 302 if options.quick else 1202
    size = 64 if options.quick else 224
    rows: list[Row] = []
    with on_threads(1):
        if not options.tiny:
            rows += compare(f"ResNet-152, {size} px", resnet152, size, (1, 2))
        rows += compare(f"CIFAR ResNet-{depth}", lambda: CifarResNet(depth), 32, (1, 2))
    print(table(rows))
    write_results(__file__, options, rows)
    return rows


if __name__ == "__main__":
    main()
