"""The memory that models too large for a laptop would need on each GPU under FSDP, with mfx and without.

    python examples/plan_large_model.py

Llama-3-70B at 8192 tokens and ViT-22B at 224 x 224 pixels are built on the meta device, where tensors have shapes and
no values, and ``mfx.plan`` rehearses training steps of each: plain, with checkpoints, with mfx, and with more and more
inputs, until they no longer fit. Parameters, gradients and optimizer state are sharded over all GPUs; activations are
not, so they decide. Three minutes, and one GiB of memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfx


class Attention(nn.Module):
    """Self-attention with fewer heads for keys and values than for queries; with rotary positions if it is causal."""

    def __init__(self, width: int, heads: int, kv_heads: int, tokens: int, *, causal: bool) -> None:
        super().__init__()
        self.size, self.causal = width // heads, causal
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        angles = torch.outer(torch.arange(tokens), 5e5 ** -(torch.arange(0, self.size, 2) / self.size))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From states (batch, tokens, width) to states of the same shape."""
        q, k, v = (part(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.causal:
            q, k = self.rotate(q), self.rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor) -> Tensor:
        """Turn every pair of features of queries or keys by an angle that grows with the position."""
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1) * self.sin + x * self.cos


class GatedMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*sizes, bias=False) for sizes in ((width, hidden), (width, hidden), (hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """From states (batch, tokens, width) to states of the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """Two residual steps: attention, then an MLP."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(width), Attention(width, heads, kv_heads, tokens, causal=True)
        self.norm2, self.mlp = nn.RMSNorm(width), GatedMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """From states (batch, tokens, width) to states of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """Takes token numbers (batch, tokens) and returns the loss of predicting each from those before it."""

    def __init__(
        self, layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, tokens: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, kv_heads, hidden, tokens) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss, a scalar."""
        logits = self.head(self.norm(self.blocks(self.embed(ids))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class ParallelBlock(nn.Module):
    """One residual step, x + attention + MLP, as in ViT-22B."""

    def __init__(self, width: int, heads: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, heads, tokens, causal=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """From states (batch, tokens, width) to states of the same shape."""
        normed = self.norm(x)
        return x + self.attention(normed) + self.mlp(normed)


class ViT(nn.Module):
    """Takes images (batch, 3, size, size) and returns logits of 1000 classes."""

    def __init__(self, layers: int, width: int, heads: int, hidden: int, size: int, patch: int) -> None:
        super().__init__()
        tokens = (size // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros(tokens, width))
        self.blocks = nn.Sequential(*(ParallelBlock(width, heads, hidden, tokens) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 1000)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Large:
    """A model, and one GPU's share of a batch."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    inputs: Callable[[int], Tensor]


def large_models(tokens: int, batch: int | None) -> list[Large]:
    """The two large models."""
    llama, vit = (
        (lambda: Llama(80, 8192, 64, 8, 28672, 128256, tokens)),
        (lambda: ViT(48, 6144, 48, 24576, 224, 14)),
    )
    return [
        Large(f"Llama-70B, {tokens} tokens", llama, batch or 1, lambda n: torch.zeros(n, tokens, dtype=torch.long)),
        Large("ViT-22B, 224 pixels", vit, batch or 64, lambda n: torch.zeros(n, 3, 224, 224, dtype=torch.bfloat16)),
    ]


def small_models() -> list[Large]:
    """The same shapes, much smaller."""
    return [
        Large("Llama", lambda: Llama(4, 64, 4, 2, 128, 100, 32), 2, lambda n: torch.zeros(n, 32, dtype=torch.long)),
        Large("ViT", lambda: ViT(4, 64, 4, 128, 28, 14), 4, lambda n: torch.zeros(n, 3, 28, 28, dtype=torch.bfloat16)),
    ]


def planned(large: Large, gpus: int, memory: str, gamma: float) -> mfx.Plan:
    """Return the plan for a model in bfloat16, sharded over GPUs."""
    with torch.device("meta"):
        model = large.build().bfloat16()
        x = large.inputs(large.batch)
    return mfx.plan(model, x, memory, world_size=gpus, fsdp=True, gamma=gamma)


def main(argv: Sequence[str] | None = None) -> list[mfx.Plan]:
    """Runs the example; returns the plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=128, help="GPUs that share the model's state (default 128)")
    parser.add_argument("--memory", default="80GiB", help="of each GPU (default 80GiB)")
    parser.add_argument("--batch", type=int, help="of each GPU (default 1 sequence, 64 images)")
    parser.add_argument("--tokens", type=int, default=8192, help="of a sequence (default 8192)")
    parser.add_argument("--gamma", type=float, default=0.9, help="momentum of the last way (default 0.9)")
    parser.add_argument("--png", default="plan_{}.png", help="where to save pictures; {} is the model's name")
    parser.add_argument("--quick", action="store_true", help="small models of these shapes, to see that it runs")
    options = parser.parse_args(argv)

    plans = []
    for large in small_models() if options.quick else large_models(options.tokens, options.batch):
        plan = planned(large, options.gpus, options.memory, options.gamma)
        print(f"{large.name}\n{plan}\n")
        plan.plot(options.png.format(plan.model))
        plans.append(plan)
    return plans


if __name__ == "__main__":
    main()
