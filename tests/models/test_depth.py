"""Activation memory does not grow with depth: 16 times as many layers, the same bytes but for digits of γ."""

import pytest
import torch
from torch import nn
from vit_pytorch import ViT

import mfx
from tests.models.step import measure


class Residual(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        return x + self.f(x)


def residual_mlp(depth):
    return nn.Sequential(*(Residual() for _ in range(depth)))


def vit(depth):
    return ViT(image_size=32, patch_size=8, num_classes=10, dim=32, depth=depth, heads=2, dim_head=16, mlp_dim=64)


# The shallow one is past the length, 6 steps in float32, up to which exact arithmetic keeps the steps' inputs instead.
DEEP = {
    "mlp": (residual_mlp, (1024, 64), 8, 1024 * 64),  # the last number is that of the stream's elements
    "vit": (vit, (32, 3, 32, 32), 4, 32 * (1 + 4 * 4) * 32),
}


@pytest.mark.parametrize("model", DEEP)
def test_peak_and_kept_at_16_times_the_depth(model):
    make, shape, depth, elements = DEEP[model]
    torch.manual_seed(0)
    shallow, deep = (measure(mfx.momentumize(make(d).train()), [torch.randn(shape)]) for d in (depth, 16 * depth))
    assert deep.peak <= 1.1 * shallow.peak
    # Digits of 7 products by 9/10 are log2(10/9) bits each, 1.1 in all, in one byte; those of 127 are 19.3, in four.
    assert deep.kept <= shallow.kept + 3 * elements


def test_plain_backpropagation_does_grow():
    make, shape, depth, _ = DEEP["mlp"]
    shallow, deep = (measure(make(d), [torch.randn(shape)]) for d in (depth, 2 * depth))
    assert deep.peak > 1.9 * shallow.peak
