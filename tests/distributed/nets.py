"""The nets on which distributed and single-process training are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mfx
from tests.distributed.world import SIZE
from tests.mfx.models import WIDTH, Stack

DEPTH = 6  # twelve steps: exact arithmetic keeps the inputs of fewer than about seven, instead of a tape
HOW = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]

# Both sums of the gradients of the two halves, one process's and all-reduce's, round once more or less: a few units in
# the last place of float32 in each of the steps between.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def make_model(depth: int = DEPTH) -> Stack:
    torch.manual_seed(0)
    model = Stack(depth)
    del model.unused  # distributed data parallel insists on a gradient for everything
    return model


def momentum(model: nn.Module, how: tuple[str, float]) -> Any:
    """The net, with nothing kept between forward and backward."""
    arithmetic, gamma = how
    return mfx.momentumize(model, arithmetic=arithmetic, gamma=gamma)


def batch(rank: int, step: int = 0) -> Tensor:
    """One process's part of a batch."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return net(x).square().sum()


def single_loss(net: nn.Module, step: int = 0) -> Tensor:
    """Return what both processes together minimise: the mean of their losses, as gradients are averaged."""
    return sum(loss_of(net, batch(rank, step)) for rank in range(SIZE)) / SIZE


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """Gathered from shards where they are sharded."""
    return {name: whole(p.grad) for name, p in net.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mean(value: Tensor) -> Tensor:
    """Of what the processes have."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / SIZE


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    assert any(tensor.abs().max() > 1e-3 for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **(tolerance or CLOSE), msg=lambda text, name=name: f"{name}: {text}"
        )
