"""States of either arithmetic by torch's operations and by Triton's kernels, and comparisons of the two."""

import torch

from mfx.engine.arithmetic import ExactState, FloatState
from mfx.engine.arithmetic.triton_states import TritonExactState, TritonFloatState
from mfx.options.gamma import Gamma

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 7, 1023, 1024, 1025]  # a block is 512
KINDS = ["residual", "map"]
TRITON = {ExactState: TritonExactState, FloatState: TritonFloatState}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MARK = -(2**63)

SOME_GAMMAS = [
    Gamma(9, 10), Gamma(1, 2), Gamma(99, 100), Gamma(1, 64), Gamma(1, 1024), Gamma(3, 4), Gamma(9999, 10000),
    Gamma(16383, 16384), Gamma(1, 16384), Gamma(1, 3), Gamma(8191, 8192),
]  # fmt: skip


def same_bits(a, b):
    """Equal, zeros' signs included; any NaN equals any other."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a.view(BITS[a.itemsize]) == b.view(BITS[b.itemsize])) | (a.isnan() & b.isnan())).all())


def any_bits(size, dtype):
    """Numbers of all magnitudes, infinities and NaN among them."""
    if dtype is torch.float64:
        return torch.randn(size, dtype=dtype) * torch.exp2(torch.randint(-80, 40, (size,)).double())
    bits = 8 * dtype.itemsize
    y = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (size,)).to(BITS[dtype.itemsize]).view(dtype)
    if dtype is torch.float16:
        return y
    # The interpreter (Triton 3.8) misreads subnormal numbers of bfloat16, which products of smaller ones would be.
    return torch.where(y.abs() < 2.0**-90, torch.zeros_like(y), y)


def whole(top):
    """A store's top as int64."""
    return top.to(torch.int64) & (2 ** (8 * top.itemsize) - 1 if top.itemsize < 8 else -1)
