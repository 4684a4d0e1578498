"""Modules that were compiled each by itself, and that steps of a chain lie in."""

from __future__ import annotations

import pytest
import torch

import mfx
from tests.mfx.models import WIDTH, Stack


def in_place(model: Stack) -> None:
    for block in model.blocks:
        block.compile(backend="eager")


def test_a_compiled_block_of_several_steps_is_told():
    net = mfx.momentumize(Stack(3))
    in_place(net)
    with pytest.warns(UserWarning, match=r"what torch.compile made of blocks\.0.* will not run"):
        net(torch.randn(2, WIDTH))
