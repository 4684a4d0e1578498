"""A step whose second run is compared with its first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from typing_extensions import override

from mfx.engine.recompute.frame import Frame, Handle, Rebuilt
from mfx.engine.recompute.saved import tensors_in

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CheckedFrame(Frame):
    """A frame that tells ``verify`` after a second run whether the branch gave the values of the first, bit for bit.

    For steps whose inputs are kept: where states are walked back, the end of the walk says so for all of them.

    What is compared is a witness: the last tensor that the branch saves of those that it computed and that are no
    smaller than its input; behind it the second run stops. And, for they enter gradients and no witness shows them, all
    saved numbers that need no gradient, such as the mask of a dropout. What came to be beside the witness, in a part of
    the branch that it does not depend on, goes unnoticed; what comes after it no gradient reads. Without a witness, and
    with forward hooks, the branch runs to its end, and its value is compared.
    """

    def __init__(self, *args: Any, verify: Callable[[Tensor], None]) -> None:
        super().__init__(*args)
        self._verify = verify
        self._sum: Tensor | None = None  # of the bits of what is compared
        self._witness: int | None = None
        self._given: frozenset[int] = frozenset()
        self._enough, self._device = 0, torch.device("cpu")
        # While the branch runs: what may be watched, by number, and the version of each when it was saved.
        self._constants: dict[int, tuple[Tensor, int]] = {}
        self._last: tuple[int, tuple[Tensor, int]] | None = None

    @override
    def run(self, x: Tensor, values: Sequence[Any], unpack: Callable[[Handle], Tensor]) -> tuple[Any, ...]:
        given = (x, *self.tensors, *tensors_in(values))
        self._given = frozenset(id(_whole(tensor)) for tensor in given if tensor is not None)
        self._enough, self._device = x.numel(), x.device
        outputs = super().run(x, values, unpack)
        watched, self._constants = self._constants, {}
        last, self._last = self._last, None
        if last is not None and _is_as_saved(*last[1]) and not self._world.has_hooks:
            self._witness = last[0]
            watched[last[0]] = last[1]
        kept = {number: tensor for number, (tensor, version) in watched.items() if _is_as_saved(tensor, version)}
        self._watched = frozenset(kept)
        # At the end: rrelu fills what it has saved after saving it.
        self._sum = _sum_of_all(self._compared(kept, outputs[0]))
        return outputs

    @override
    def rerun(self, x: Tensor, rebuilt: Rebuilt, *, to_value: bool) -> Tensor | None:
        return super().rerun(x, rebuilt, to_value=to_value or self._witness is None)

    @override
    def _pack(self, tensor: Tensor) -> Handle:
        # FSDP2's parameters are in no place while they are whole, and freed afterwards.
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
    def _compare(self, seen: Mapping[int, Tensor], y: Tensor | None) -> None:
        if self._sum is None or self._watched - seen.keys():
            return  # bits cannot be seen; or the first run is still under way
        compared = self._compared(seen, y)
        if (now := _sum_of_all(compared)) is not None:
            same = now == self._sum
            if same.device.type == "cpu" and same:
                return
            finite = torch.stack([value.isfinite().all() for value in compared]).all()
            self._verify(same | finite.logical_not_())  # the bits of a NaN are nobody's promise

    def _compared(self, watched: Mapping[int, Tensor], y: object) -> list[Tensor]:
        """The watched tensors, and the value if there is no witness, as far as their bits can be seen."""
        values: list[object] = [watched[number] for number in sorted(self._watched)]
        if self._witness is None:
            values.append(y)
        return [value for value in values if _has_bits(value)]


def _is_as_saved(tensor: Tensor, version: int) -> bool:
    return tensor._version == version


def _whole(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _has_bits(value: object) -> TypeGuard[Tensor]:
    return type(value) is Tensor and (value.is_floating_point() or value.dtype is torch.bool)


def _sum_of_all(values: Sequence[Tensor]) -> Tensor | None:
    """One number that depends on no order within a tensor, so on no number of threads."""
    total: Tensor | None = None
    for value in values:
        total = _sum_of_bits(value) if total is None else total.mul_(31).add_(_sum_of_bits(value))
    return total


def _sum_of_bits(y: Tensor) -> Tensor:
    y = y.detach()
    if y.is_contiguous() and (y.numel() | y.storage_offset()) * y.dtype.itemsize % 8 == 0:
        return y.view(-1).view(torch.int64).sum()  # a CPU adds these many at a time
    return y.view(_BITS[y.dtype.itemsize]).sum()
