"""The residual blocks that the benchmarks train: x + Linear(GELU(Linear(LayerNorm(x))))."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Branch", "Residual"]


class Branch(nn.Module):
    """The branch of a block; inside it is four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """f(x), of the shape of x: (batch, width)."""
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class Residual(nn.Module):
    """A stack of blocks, as it is usually written."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The state after the last block: (batch, width) to the same."""
        for branch in self.branches:
            x = x + branch(x)
        return x
