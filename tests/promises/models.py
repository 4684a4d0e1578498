"""Models that other people wrote, one of each kind, small; and what a training step leaves behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

DEPTH = 13  # exact arithmetic walks back through chains of 12 steps or more; it keeps the inputs of shorter ones


def stack(depth: int = DEPTH, width: int = 16) -> nn.Module:
    """Return blocks x + f(x) with dropout and BatchNorm, which a trace can follow."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2)
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    return nn.Sequential(nn.Linear(8, width), *(Block() for _ in range(depth)), nn.Linear(width, 3))


def encoder() -> nn.Module:
    """Return torch's own encoder, which only Dynamo can follow."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 7, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a stack of blocks": (stack, (6, 8)),
    "ResNet": (lambda: resnet18(num_classes=10), (2, 3, 32, 32)),
    "ViT": (lambda: VisionTransformer(16, 8, 7, 2, 16, 32, 0.1, 0.1, num_classes=10), (2, 3, 16, 16)),
    "TransformerEncoder": (encoder, (2, 5, 16)),
}


def trained(net: nn.Module, shape: tuple[int, ...], steps: int = 2) -> dict[str, Any]:
    """Return all that training steps from fixed random states, and an evaluation after them, leave behind."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    net.train()
    outputs = []
    for _ in range(steps):
        y = net(x)
        y.square().mean().backward()
        outputs.append(y.detach())
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": str(np.random.get_state())}  # noqa: NPY002
    net.eval()
    with torch.no_grad():
        outputs.append(net(x))
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {
        **{f"output {i}": y for i, y in enumerate(outputs)},
        **{f"gradient of {name}": grad for name, grad in {"x": x.grad, **gradients}.items()},
        **{f"buffer {name}": buffer for name, buffer in net.named_buffers()},
        **{f"random state of {name}": state for name, state in states.items()},
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names under which two results are not the same, bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if not _same(value, expected[name])]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
