"""The models that `gpu.py` trains: torchvision's where it is installed, else the same layers in plain torch.

Decoders are stacks of blocks on vectors, without an embedding and a head, whose logits would hide the blocks' memory.
All parameters are bfloat16 on a device, and float32 at the sizes of a test.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        name: as in the table.
        build: makes it, on the default device, in float32.
        make: makes an input of that many units, on the default device, in float32.
        units: as many as a step has where its time is taken.
        unit: "images" of a batch, or "tokens" of a sequence.
        dtype: of parameters and inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    make: Callable[[int], Tensor]
    units: int
    unit: str
    dtype: torch.dtype = torch.bfloat16

    def built(self, device: torch.device | str) -> nn.Module:
        """Return the model on a device, the same at every call, in training mode."""
        torch.manual_seed(0)
        with torch.device(device):
            return self.build().to(self.dtype)

    def input(self, device: torch.device | str, units: int | None = None) -> Tensor:
        """Return an input on a device; that of a decoder requires a gradient."""
        torch.manual_seed(1)
        with torch.device(device):
            x = self.make(self.units if units is None else units).to(self.dtype)
        return x.requires_grad_(self.unit == "tokens")


def _from_torchvision(name: str, own: Callable[[], nn.Module]) -> nn.Module:
    try:
        models: Any = import_module("torchvision.models")
    except (ImportError, RuntimeError):  # the latter beside another torch than its own
        return own()
    return getattr(models, name)()


# --- images -----------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A block of a ResNet-50: 1×1, 3×3 and 1×1 convolutions, with batch normalization."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.down = None
        if stride != 1 or width_in != out:
            self.down = nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Images to images of four times ``width`` channels."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


def resnet(depths: tuple[int, ...], width: int = 64) -> nn.Module:
    """A ResNet of bottlenecks: depths (3, 4, 6, 3) make a ResNet-50."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inner, before = width, width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(Bottleneck(before, inner, 2 if stage and not i else 1))
            before = 4 * inner
        inner *= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


class Attention(nn.Module):
    """Attention of several heads, and rotary positions where the call gives cosines and sines."""

    def __init__(self, width: int, heads: int, *, causal: bool, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if cos is not None and sin is not None:
            q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def _rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = t.chunk(2, -1)
    return t * cos + torch.cat([-b, a], -1) * sin


class Block(nn.Module):
    """A block of a ViT or, if it is causal, of a GPT-2: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A vision transformer on square images; its head reads the mean of the tokens."""

    def __init__(self, depth: int, width: int, heads: int, patch: int, tokens: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images to the numbers of 1000 classes."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class ConvNextBlock(nn.Module):
    """A block of a ConvNeXt, in torchvision's order of dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Images of ``width`` channels to the same."""
        y = self.down(F.gelu(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1)))))
        return x + self.scale * y.permute(0, 3, 1, 2)


def convnext(depths: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
    """A ConvNeXt: depths (3, 3, 27, 3) and widths (128, 256, 512, 1024) make its size B."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4)]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            layers.append(nn.Conv2d(widths[stage - 1], width, 2, 2))
        layers.extend(ConvNextBlock(width) for _ in range(depth))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000))


# --- decoders ---------------------------------------------------------------------------------------------------------


def gpt2(depth: int, width: int, heads: int) -> nn.Module:
    """A stack of blocks as GPT-2's."""
    return nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))


class Rotary(nn.Module):
    """Cosines and sines of rotary positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For x of shape (batch, tokens, ·): each of shape (tokens, width), in the dtype of x."""
        frequencies = torch.exp(torch.arange(0, self.width, 2, device=x.device) * (-math.log(10000.0) / self.width))
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class LlamaBlock(nn.Module):
    """A block of a Llama: RMSNorm, rotary positions, a gated branch."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, causal=True, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A stack of blocks as Llama's."""

    def __init__(self, depth: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.rotary = Rotary(width // heads)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, inner) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        cos, sin = self.rotary(x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return x


# --- what is measured -------------------------------------------------------------------------------------------------


def images(pixels: int, count: int) -> Tensor:
    """A batch of square images."""
    return torch.randn(count, 3, pixels, pixels).to(memory_format=torch.channels_last)


def tokens(width: int, batch: int, count: int) -> Tensor:
    """A batch of sequences."""
    return torch.randn(batch, count, width)


_RESNET50, _RESNET152 = (3, 4, 6, 3), (3, 8, 36, 3)
_CONVNEXT = (3, 3, 27, 3), (128, 256, 512, 1024)


def _decoder(name: str, build: Callable[[], nn.Module], width: int, count: int) -> Model:
    batch = max(1, 16384 // count)
    return Model(f"{name}, {batch} × {count // 1024}k", build, partial(tokens, width, batch), count, "tokens")


def models() -> list[Model]:
    """The models, by importance."""
    photos = partial(images, 224)
    llama, gpt = partial(Llama, 16, 2048, 16, 5632), partial(gpt2, 24, 1024, 16)
    vit, convnext_b = partial(Vit, 24, 1024, 16, 16, 196), partial(convnext, *_CONVNEXT)
    resnet50, resnet152 = partial(resnet, _RESNET50), partial(resnet, _RESNET152)
    return [
        _decoder("Llama-like", llama, 2048, 2048),
        Model("ViT-L/16", partial(_from_torchvision, "vit_l_16", vit), photos, 64, "images"),
        Model("ResNet-50", partial(_from_torchvision, "resnet50", resnet50), photos, 128, "images"),
        _decoder("GPT-2-like", gpt, 1024, 2048),
        _decoder("Llama-like", llama, 2048, 8192),
        Model("ResNet-152", partial(_from_torchvision, "resnet152", resnet152), photos, 64, "images"),
        Model("ConvNeXt-B", partial(_from_torchvision, "convnext_base", convnext_b), photos, 64, "images"),
        _decoder("Llama-like", llama, 2048, 32768),
        _decoder("GPT-2-like", gpt, 1024, 8192),
        _decoder("GPT-2-like", gpt, 1024, 32768),
    ]


def small_models(dtype: torch.dtype = torch.float32) -> list[Model]:
    """The same layers at small sizes: for comparisons bit by bit, and for tests."""
    pictures, vectors = partial(images, 32), partial(tokens, 32, 2)
    return [
        Model("Llama-like", partial(Llama, 5, 32, 2, 64), vectors, 12, "tokens", dtype),
        Model("ResNet", partial(resnet, (2, 10), 8), pictures, 2, "images", dtype),
        Model("ViT", partial(Vit, 5, 32, 2, 8, 16), pictures, 2, "images", dtype),
        Model("GPT-2-like", partial(gpt2, 5, 32, 2), vectors, 12, "tokens", dtype),
        Model("ConvNeXt", partial(convnext, (2, 9), (8, 16)), pictures, 2, "images", dtype),
    ]


_BLOCKS = {"Bottleneck", "EncoderBlock", "CNBlock", "Block", "ConvNextBlock", "LlamaBlock"}


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, *args, use_reentrant=False)
        return out


def with_checkpoints(model: nn.Module) -> nn.Module:
    """Return the model with ``torch.utils.checkpoint`` around every block, over the same parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in _BLOCKS:
                setattr(parent, name, _Checkpointed(child))
    return copied
