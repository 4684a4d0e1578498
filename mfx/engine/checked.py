"""A step whose second run is compared with its first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mfx.engine.frame import Frame, Handle, Rebuilt
from mfx.engine.keep import tensors_in

__all__ = ["CheckedFrame"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckedFrame(Frame):
    """A frame that tells ``verify`` after a second run whether the branch gave the values of the first, bit for bit.

    For steps whose inputs are kept: where states are walked back, the end of the walk says so for all of them.

    What is compared is a witness: the last tensor that the branch saves of those that it computed and that are no
    smaller than its input; behind it the second run stops. What came to be beside it, in a part of the branch that it
    does not depend on, goes unnoticed; what comes after it no gradient reads. Without a witness, and with forward
    hooks, the branch runs to its end, and its value is compared.
    """

    def __init__(self, *args: Any, verify: Callable[[Tensor], None]) -> None:
        super().__init__(*args)
        self._verify = verify
        self._sum: Tensor | None = None
        self._given: frozenset[int] = frozenset()
        self._enough = 0
        self._last: tuple[int, Tensor, int] | None = None  # the witness so far: its number, itself, its version

    @override
    def run(self, x: Tensor, values: Sequence[Any], unpack: Callable[[Handle], Tensor]) -> tuple[Any, ...]:
        given = (x, *self.tensors, *tensors_in(values))
        self._given = frozenset(id(_whole(tensor)) for tensor in given if tensor is not None)
        self._enough = x.numel()
        outputs = super().run(x, values, unpack)
        last, self._last = self._last, None
        if last is None or last[1]._version != last[2] or self._world.has_hooks:
            self._sum = _sum_of_bits(outputs[0])
        else:
            self._witness, witness, _ = last
            self._sum = _sum_of_bits(witness)
        return outputs

    @override
    def rerun(self, x: Tensor, rebuilt: Rebuilt, *, to_value: bool) -> Tensor | None:
        return super().rerun(x, rebuilt, to_value=to_value or self._witness is None)

    @override
    def _pack(self, tensor: Tensor) -> Handle:
        if tensor.requires_grad and tensor.numel() >= self._enough:
            whole = _whole(tensor)
            # Leaves are parameters: FSDP2's, which are in no place while they are whole, too.
            if not whole.is_leaf and id(whole) not in self._given:
                self._last = len(self._packed), tensor, tensor._version
        return super()._pack(tensor)

    @override
    def _compare(self, witness: Tensor | None, y: Tensor | None) -> None:
        if self._sum is None or (value := y if self._witness is None else witness) is None:
            return
        if (now := _sum_of_bits(value)) is not None:
            same = now == self._sum
            if same.device.type == "cpu" and same:
                return
            self._verify(same | value.isfinite().all().logical_not_())  # the bits of a NaN are nobody's promise


def _whole(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _sum_of_bits(y: object) -> Tensor | None:
    """One number that depends on no order, so on no number of threads; None where bits cannot be seen."""
    if type(y) is not Tensor or not y.is_floating_point():
        return None
    y = y.detach()
    if y.is_contiguous() and (y.numel() | y.storage_offset()) * y.dtype.itemsize % 8 == 0:
        return y.view(-1).view(torch.int64).sum()  # a CPU adds these many at a time
    return y.view(_BITS[y.dtype.itemsize]).sum()
