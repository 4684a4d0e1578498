"""Models with blocks that are in no chain, each with the classes that one would put a checkpoint around."""

from functools import partial

import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class Wide(nn.Module):
    """x + f(x) of a ConvNeXt."""

    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
            nn.Dropout(0.2),
        )

    def forward(self, x):
        return x + self.f(x)


def convnext():
    def down(width, out):
        return nn.Sequential(nn.GroupNorm(1, width), nn.Conv2d(width, out, 2, 2))

    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), Wide(8), Wide(8), down(8, 16), Wide(16), down(16, 32), Wide(32))


def branch(width, out, stride=1):
    first = nn.Conv2d(width, out, 3, stride, 1)
    return nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(out, out, 3, 1, 1))


class Same(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.f = branch(width, width)

    def forward(self, x):
        return torch.relu(x + self.f(x))


class Projected(nn.Module):
    """A block of another class than those in chains, as in some ports of ResNets."""

    def __init__(self, width, out):
        super().__init__()
        self.f, self.skip = branch(width, out, 2), nn.Conv2d(width, out, 1, 2)

    def forward(self, x):
        return torch.relu(self.skip(x) + self.f(x))


def two_classes():
    stages = [nn.Sequential(Projected(8 << i, 16 << i), Same(16 << i), Same(16 << i)) for i in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Same(8), Same(8), *stages)


class Layer(nn.Module):
    """The branch of a step that is added elsewhere."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Tower(nn.Module):
    """Adds up layers in a loop, as no chain may: broadcast, or every other one without a skip; or as it may."""

    def __init__(self, size, kind=""):
        super().__init__()
        self.layers, self.kind = nn.ModuleList([Layer(144) for _ in range(size)]), kind

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if self.kind == "broadcast":
                x = x + layer(x).mean(-1, keepdim=True)
            else:
                x = layer(x) if number % 2 and self.kind == "every other" else x + layer(x)
        return x


def towers(*stages):
    return nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Flatten(2), *stages, nn.Linear(144, 4))


def tower(kind):
    return towers(Tower(2), nn.Linear(144, 144), Tower(8, kind))


def towers_in_a_row():
    return towers(Tower(4), Tower(4), nn.Linear(144, 144), Tower(4, "broadcast"))


class Pair(nn.Module):
    """Two steps of different kinds; the first one has a projection where the shape changes."""

    def __init__(self, width, out=None):
        super().__init__()
        self.skip = nn.Identity() if out is None else nn.Conv2d(width, out, 1, 2)
        out, stride = out or width, 1 if out is None else 2
        self.mix = nn.Sequential(nn.GroupNorm(1, width), nn.Conv2d(width, out, 3, stride, 1), nn.GELU())
        self.mlp = nn.Sequential(
            nn.GroupNorm(1, out), nn.Conv2d(out, 4 * out, 1), nn.GELU(), nn.Conv2d(4 * out, out, 1)
        )

    def forward(self, x):
        x = self.skip(x) + self.mix(x)
        return x + self.mlp(x)


def pairs(patch, *shapes):
    return nn.Sequential(nn.Conv2d(3, 8, patch, patch), *(Pair(*shape) for shape in shapes))


def resnet(block):
    return ResNet(block, [2, 2, 1, 3] if block is BasicBlock else [2, 1, 3, 1], num_classes=3)


MODELS = {
    "basic block": (partial(resnet, BasicBlock), BasicBlock),
    "bottleneck": (partial(resnet, Bottleneck), Bottleneck),
    "convnext": (convnext, Wide),
    "mobilenet": (partial(mobilenet_v2, num_classes=3), InvertedResidual),
    "two classes": (two_classes, (Same, Projected)),
    "tower, broadcast": (partial(tower, "broadcast"), Layer),
    "tower, every other": (partial(tower, "every other"), Layer),
    "towers in a row": (towers_in_a_row, Layer),
    "pairs": (partial(pairs, 1, (8,), (8,), (8, 16), (16, 32), (32,)), Pair),
    "half a pair": (partial(pairs, 4, (8,), (8,), (8, 64), (64,), (64, 256), (256,)), Pair),
}
