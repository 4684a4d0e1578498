"""Fixed point: the int64 integers that stand for real numbers in exact arithmetic.

A CPU computes with float64 four or eight at a time, with int64 mostly one by one. Keeping integers below 2⁵⁰ as float64
makes a training step of a ViT-S (12 layers of width 384, 197 tokens) 4 % faster at batch 4 and 6 % at batch 1, in
processor time on one thread. That is too little for a second representation of every number.
"""

from __future__ import annotations

import torch
from torch import Tensor

ONE = 2.0**40  # 1.0 in fixed point


def nearest(t: Tensor) -> Tensor:
    """Return the integers nearest to float64 ``t``, ties to even, in the memory of ``t``, whose values are gone.

    Args:
        t: numbers below 2⁶³ in magnitude.
    """
    return t.view(torch.int64).copy_(t.round_())  # each element is read before it is written over
