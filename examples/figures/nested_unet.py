"""Draws nested_unet.svg, the figure of the README: a U-Net of residual blocks, whose chains lie in each other.

    python examples/figures/nested_unet.py

What ``mfx.draw`` makes of the rewritten graph, with nothing added.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import mfx

FILE = Path(__file__).with_suffix(".svg")


class Block(nn.Module):
    """x + f(x), of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width of the image) to the same."""
        return x + self.conv2(torch.relu(self.conv1(x)))


class Level(nn.Module):
    """x + up(inner(down(x))): all that lies at coarser resolutions is one residual step."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.down, self.inner, self.up = (
            nn.Conv2d(width, 2 * width, 2, 2),
            inner,
            nn.ConvTranspose2d(2 * width, width, 2, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width of the image) to the same."""
        return x + self.up(self.inner(self.down(x)))


class UNet(nn.Module):
    """Two blocks on the way down and two on the way up at each resolution, four at the coarsest."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 1, 1)
        coarsest = nn.Sequential(*(Block(4 * width) for _ in range(4)))
        middle = self.around(2 * width, Level(2 * width, coarsest))
        self.body = self.around(width, Level(width, middle))

    @staticmethod
    def around(width: int, level: nn.Module) -> nn.Sequential:
        """Return a level between blocks of its width."""
        return nn.Sequential(Block(width), Block(width), level, Block(width), Block(width))

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, 3, height, width) to masks (batch, 1, height, width)."""
        out: Tensor = self.head(self.body(self.stem(x)))
        return out


def main(argv: Sequence[str] | None = None) -> Path:
    """Draws the figure; returns the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, default=FILE, help="where to save it")
    path: Path = parser.parse_args(argv).svg
    mfx.draw(mfx.momentumize(UNet()), path)
    return path


if __name__ == "__main__":
    main()
