"""A frame whose recomputation is compared with the forward pass, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from typing_extensions import override

from mfx.engine.recompute.frame import Frame
from mfx.engine.recompute.rebuilt import Handle, Rebuilt
from mfx.engine.recompute.saved import tensors_in

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckedFrame(Frame):
    """A frame that reports to ``verify`` whether recomputation gave the values of the forward pass, bit for bit.

    For steps whose inputs are kept. Where states are walked back, the end of the walk verifies all steps at once.

    Two things are compared. The witness: the last saved tensor that the branch computed and that is not smaller than
    its input; the recomputation stops early behind it. And all saved numbers that need no gradient, such as the mask of
    a dropout: they enter gradients, and the witness may not depend on them. A part of the branch that the witness does
    not depend on goes unnoticed; no gradient reads what comes after it. Without a witness, and with forward hooks, the
    branch runs to its end, and its value is compared.

    Comparing shapes and dtypes, as ``torch.utils.checkpoint`` does, would miss what this is for: forward hooks that
    count, numbers drawn by Python, numpy or a generator of the model's own. They give other values of the same shape.
    """

    def __init__(self, *args: Any, verify: Callable[[Tensor], None]) -> None:
        super().__init__(*args)
        self._verify = verify
        self._sum: Tensor | None = None  # of the bits of the compared tensors
        self._witness: int | None = None
        self._given: frozenset[int] = frozenset()
        self._enough, self._device = 0, torch.device("cpu")
        # While the branch runs: candidates, by number, each with its version when it was saved.
        self._constants: dict[int, tuple[Tensor, int]] = {}
        self._last: tuple[int, tuple[Tensor, int]] | None = None

    @override
    def run(self, xs: Sequence[Tensor], values: Sequence[Any], unpack: Callable[[Handle], Tensor]) -> tuple[Any, ...]:
        given = (*xs, *self.tensors, *tensors_in(values))
        self._given = frozenset(id(_whole(tensor)) for tensor in given if tensor is not None)
        self._enough, self._device = min(x.numel() for x in xs), xs[0].device
        try:
            outputs = super().run(xs, values, unpack)
        finally:  # what autograd has recorded refers to this frame, and would never be freed
            watched, self._constants = self._constants, {}
            last, self._last = self._last, None
        if last is not None and _is_as_saved(*last[1]) and not self._env.has_hooks:
            self._witness = last[0]
            watched[last[0]] = last[1]
        kept = {number: tensor for number, (tensor, version) in watched.items() if _is_as_saved(tensor, version)}
        self._watched = frozenset(kept)
        # Not before the end: rrelu fills a tensor after saving it.
        self._sum = _sum_of_all(self._compared(kept, outputs[: self._writes]))
        return outputs

    @override
    def rerun(self, xs: Sequence[Tensor], rebuilt: Rebuilt, *, to_value: bool) -> Sequence[Tensor] | None:
        return super().rerun(xs, rebuilt, to_value=to_value or self._witness is None)

    @override
    def _pack(self, tensor: Tensor) -> Handle:
        # FSDP2's parameters are in no slot while they are whole, and freed afterwards.
        if tensor.requires_grad:
            whole = _whole(tensor)
            if tensor.numel() >= self._enough and not whole.is_leaf and id(whole) not in self._given:
                self._last = len(self._packed), (tensor, tensor._version)
        elif tensor.device == self._device and _has_bits(tensor) and not self._is_given(tensor):
            self._constants[len(self._packed)] = tensor, tensor._version
        return super()._pack(tensor)

    def _is_given(self, tensor: Tensor) -> bool:
        whole = _whole(tensor)
        return id(whole) in self._given or isinstance(whole, nn.Parameter)

    @override
    def _compare(self, seen: Mapping[int, Tensor], ys: Sequence[Tensor] | None) -> None:
        if self._sum is None or self._watched - seen.keys():
            return  # bits are not accessible; or the forward pass is still under way
        compared = self._compared(seen, ys or ())
        if (now := _sum_of_all(compared)) is not None:
            same = now == self._sum
            if same.device.type == "cpu" and same:
                return
            finite = torch.stack([value.isfinite().all() for value in compared]).all()
            self._verify(same | finite.logical_not_())  # the bits of a NaN may differ

    def _compared(self, watched: Mapping[int, Tensor], ys: Sequence[object]) -> list[Tensor]:
        """Return the watched tensors, and the values if there is no witness, as far as their bits are accessible."""
        values: list[object] = [watched[number] for number in sorted(self._watched)]
        if self._witness is None:
            values += ys
        return [value for value in values if _has_bits(value)]


def _is_as_saved(tensor: Tensor, version: int) -> bool:
    return tensor._version == version


def _whole(tensor: Tensor) -> Tensor:
    """Return the base of a view, or the tensor itself."""
    return tensor if tensor._base is None else tensor._base


def _has_bits(value: object) -> TypeGuard[Tensor]:
    return type(value) is Tensor and (value.is_floating_point() or value.dtype is torch.bool)


def _sum_of_all(values: Sequence[Tensor]) -> Tensor | None:
    """Return a checksum that does not depend on the order within a tensor, so not on the number of threads."""
    total: Tensor | None = None
    for value in values:
        total = _sum_of_bits(value) if total is None else total.mul_(31).add_(_sum_of_bits(value))
    return total


def _sum_of_bits(y: Tensor) -> Tensor:
    y = y.detach()
    if y.is_contiguous() and (y.numel() | y.storage_offset()) * y.dtype.itemsize % 8 == 0:
        return y.view(-1).view(torch.int64).sum()  # a CPU adds these many at a time
    return y.view(_BITS[y.dtype.itemsize]).sum()
