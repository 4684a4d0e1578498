"""Five small networks of residual blocks: an MLP, a ViT, a U-Net with added and one with joined skips, a ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.benchmarks.blocks import Branch

__all__ = ["Block", "Layer", "innermost", "layers", "mlp", "resnet", "unet", "vit"]


class Block(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        out: Tensor = x + self.branch(x)
        return out


class Layer(nn.Sequential):
    """Blocks that are usually checkpointed together: attention, then an MLP."""


def innermost(model: nn.Module) -> list[Block]:
    """Return the blocks that hold no others."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return [block for block in blocks if sum(isinstance(module, Block) for module in block.modules()) == 1]


def layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a transformer; none of other networks."""
    return [module for module in model.modules() if isinstance(module, Layer)]


def mlp(depth: int, width: int) -> nn.Module:
    """Return the blocks of the other benchmarks, one after another: (batch, width) to the same."""
    return nn.Sequential(*(Block(Branch(width)) for _ in range(depth)))


class Attention(nn.Module):
    """Attention after a norm, with four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class ViT(nn.Module):
    """Patches of 4 pixels, layers, the mean of the tokens."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.Sequential(*(Layer(Block(Attention(width)), Block(Branch(width))) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, 3, height, width) to (batch, 10)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return out


def vit(depth: int, width: int) -> nn.Module:
    """Return a vision transformer."""
    return ViT(depth, width)


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
    )


class Joined(nn.Module):
    """Convolution of x and inner(x) joined, by which the skip of a U-Net often comes back."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.join = inner, nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width of the image) to the same."""
        out: Tensor = self.join(torch.cat([x, self.inner(x)], 1))
        return out


def unet(width: int, depth: int, *, added: bool) -> nn.Module:
    """Return a U-Net of three resolutions with ``depth`` blocks on either side of each.

    Args:
        width: channels at the finest resolution.
        depth: of blocks.
        added: add the skips, so that all that is coarser is one residual step; else join them as channels.
    """
    body = nn.Sequential(*(Block(_convolutions(4 * width)) for _ in range(2 * depth)))
    for channels in (2 * width, width):
        inner = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 2, 2), body, nn.ConvTranspose2d(2 * channels, channels, 2, 2)
        )
        skip = Block(inner) if added else Joined(channels, inner)
        sides = [[Block(_convolutions(channels)) for _ in range(depth)] for _ in range(2)]
        body = nn.Sequential(*sides[0], skip, *sides[1])
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), body, nn.Conv2d(width, 1, 1))


class Rectified(Block):
    """relu(s(x) + f(x)) of a ResNet; s is a projection where the shape changes."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(inside, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
        )
        is_same = inside == width and stride == 1
        projection = nn.Conv2d(inside, width, 1, stride, bias=False)
        self.skip = nn.Identity() if is_same else nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inside, height, width of the image) to width channels, smaller by the stride."""
        return torch.relu(self.skip(x) + self.branch(x))


def resnet(depth: int, width: int) -> nn.Module:
    """Return a ResNet of CIFAR: three stages of ``depth`` blocks each."""
    blocks: list[nn.Module] = []
    inside = width
    for stage in range(3):
        for number in range(depth):
            blocks.append(Rectified(inside, width << stage, 2 if stage and not number else 1))
            inside = width << stage
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
