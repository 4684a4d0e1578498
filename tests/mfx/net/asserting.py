"""Assertions of a model's own: pytest rewrites those of its test modules."""

from __future__ import annotations

import torch
from torch import Tensor


def asserted(x: Tensor) -> Tensor:
    assert torch.isfinite(x).all(), "it is not finite"
    return x
