"""Nets for the fake accelerator, and one training step of them."""

import copy

import torch
from torch import Tensor, nn

import mfx
from tests.accelerator import device as fake

WIDTH, DEPTH = 8, 13  # walked back


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.dropout(torch.tanh(self.a(x))))


def stack(block=Block, depth: int = DEPTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(depth)))


def batch() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def momentumized(model: nn.Module, **options) -> nn.Module:
    return mfx.momentumize(fake.to_device(copy.deepcopy(model)), **options)


def trained(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradients of a step from the same random state, and what is drawn after it."""
    torch.manual_seed(2)
    fake.backend.manual_seed(2)
    net.zero_grad()
    x = fake.to_device(x).requires_grad_() if x.device.type == "cpu" else x
    net(x).square().sum().backward()
    after = fake.to_device(torch.zeros(3)).uniform_()
    return [fake.on_host(t) for t in (x.grad, *(p.grad for p in net.parameters()), after, torch.rand(3))]
