"""Measures what a step costs in its first run: bytes saved for the backward pass, and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from mfx.compat import memory_of
from mfx.engine.memory.flops import FlopCounter
from mfx.engine.memory.plan import StepCost

_Storages = dict[int, tuple[Any, int]]


class StepMeasure(FlopCounter):
    """Counts FLOPs while it is active, and the memory of the tensors passed to ``saw``.

    Every storage counts once. The storages stay alive as long as the measure, so no two of them can have the same
    address.

    Args:
        ignored: tensors whose memory does not count: parameters, buffers, captures.
    """

    def __init__(self, ignored: Iterable[Tensor | None]) -> None:
        super().__init__()
        self._flops_to_last_saved = 0
        self._ignored = {key for tensor in ignored if tensor is not None for key in storages_by_address(tensor)}
        self._saved: _Storages = {}
        self._group: dict[int, int] = {}
        self._held: list[Any] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True, so that a compiled branch runs compiled while it is measured: its recomputation does."""
        return True

    def saw(self, tensor: Tensor) -> None:
        """Count a tensor that is saved for the backward pass."""
        self._flops_to_last_saved = self.flops
        for key, found in storages_by_address(tensor).items():
            if key not in self._ignored:
                self._saved[key] = found
                self._group[key] = found[1]

    def begin_group(self) -> None:
        """Start a new group of saved tensors."""
        self._group = {}

    def group(self) -> dict[int, int]:
        """Return the sizes of this group's storages, by address; a storage may be in several groups."""
        return self._group

    def hold(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        """Keep the storages of tensors alive, like those of saved ones; return the sizes of those that count."""
        found = {key: value for tensor in tensors for key, value in storages_by_address(tensor).items()}
        self._held += found.values()
        return {key: size for key, (_, size) in found.items() if key not in self._ignored}

    def cost(self, xs: Sequence[Tensor], ys: Sequence[object], fresh: Sequence[Tensor], *, shared: bool) -> StepCost:
        """Return the cost of the step that was run.

        Args:
            xs: the states that it reads.
            ys: its values.
            fresh: those of the states that no earlier step has read.
            shared: the values are states that later steps read and count there; recomputation need not reach them.
        """
        inputs, new = _storages_of(xs), _storages_of(fresh)
        values = _storages_of(y for y in ys if isinstance(y, Tensor))
        reads = _size({key: found for key, found in new.items() if key in self._saved})
        left_out = {*inputs, *(values if shared else ())}
        saved = _size({key: found for key, found in self._saved.items() if key not in left_out})
        value = 0 if shared else _size({k: v for k, v in values.items() if k not in self._saved and k not in inputs})
        flops = self._flops_to_last_saved if shared else self.flops
        return StepCost(saved, reads, _size(new), value, flops)


def _storages_of(tensors: Iterable[Tensor]) -> _Storages:
    return {key: found for tensor in tensors for key, found in storages_by_address(tensor).items()}


def storages_by_address(tensor: Tensor) -> _Storages:
    """Return the storage of a tensor and its size, by address; for tensors without one, the tensor itself."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return {id(tensor): (tensor, tensor.numel() * tensor.element_size())}
    return {memory_of(storage): (storage, storage.nbytes())}


def _size(storages: _Storages) -> int:
    return sum(size for _, size in storages.values())
