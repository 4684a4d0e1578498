"""A step whose second run is compared with its first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mfx.engine.frame import Frame, Handle, Rebuilt

__all__ = ["CheckedFrame"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckedFrame(Frame):
    """A frame that tells ``verify`` after a second run whether the branch gave the values of the first, bit for bit.

    For steps whose inputs are kept: where states are walked back, the end of the walk says so for all of them.
    """

    def __init__(self, *args: Any, verify: Callable[[Tensor], None]) -> None:
        super().__init__(*args)
        self._verify = verify
        self._sum: Tensor | None = None

    @override
    def run(self, x: Tensor, values: Sequence[Any], unpack: Callable[[Handle], Tensor]) -> tuple[Any, ...]:
        outputs = super().run(x, values, unpack)
        self._sum = _sum_of_bits(outputs[0])
        return outputs

    @override
    def rerun(self, x: Tensor, rebuilt: Rebuilt) -> Tensor:
        y = super().rerun(x, rebuilt)
        if self._sum is not None and (now := _sum_of_bits(y)) is not None:
            same = now == self._sum
            if same.device.type == "cpu" and same:
                return y
            self._verify(same | y.isfinite().all().logical_not_())  # what the bits of a NaN are is nobody's promise
        return y


def _sum_of_bits(y: object) -> Tensor | None:
    """One number that depends on no order, so on no number of threads; None where bits cannot be seen."""
    if type(y) is not Tensor or not y.is_floating_point():
        return None
    y = y.detach()
    if y.is_contiguous() and (y.numel() | y.storage_offset()) * y.dtype.itemsize % 8 == 0:
        return y.view(-1).view(torch.int64).sum()  # a CPU adds these many at a time
    return y.view(_BITS[y.dtype.itemsize]).sum()
