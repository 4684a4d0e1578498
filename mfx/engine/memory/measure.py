"""Measures what a step costs in its first run: bytes saved for the backward pass, and floating-point operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter
from typing_extensions import override

from mfx.compat import memory_of
from mfx.engine.memory.flops import FlopCounter
from mfx.engine.memory.plan import StepCost

_BLOCK = 512  # bytes; CUDA's allocator rounds every request up to a multiple of them


class StorageKeys:
    """Numbers storages, and never gives a number twice: an address is used again when a storage is gone.

    Attributes:
        alive: the numbers of those that are alive.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by address; of storages that are alive
        self._count = 0
        self.alive: set[int] = set()

    def sizes(self, tensors: Iterable[object]) -> dict[int, int]:
        """Return the sizes in bytes of the storages of the tensors among ``tensors``, by number.

        A tensor without a storage counts itself.
        """
        found = {}
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                memory, address, size = _memory(tensor)
                found[self._number(memory, address)] = size
        return found

    def _number(self, memory: Any, address: int) -> int:
        if address not in self._numbers:
            self._count += 1
            forget = weakref.ref(memory, partial(_forget, weakref.ref(self), address))
            self._numbers[address] = self._count, forget
            self.alive.add(self._count)
        return self._numbers[address][0]


def _forget(keys: weakref.ref[StorageKeys], address: int, _: object) -> None:
    if (alive := keys()) is not None:
        alive.alive.discard(alive._numbers.pop(address)[0])


def _memory(tensor: Tensor) -> tuple[Any, int, int]:
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return tensor, id(tensor), tensor.numel() * tensor.element_size()
    size = storage.nbytes()
    if tensor.is_cuda:
        size = -(-size // _BLOCK) * _BLOCK
    return storage, memory_of(storage), size


class StepMeasure(FlopCounter):
    """Counts FLOPs while it is active, and the memory of the tensors passed to ``saw``.

    Every storage counts once. None is kept alive: what is measured takes no more memory than what is not.

    Args:
        keys: numbers the storages; the attribute has that name, too.
        ignored: tensors whose memory does not count: parameters, buffers, captures.
    """

    def __init__(self, keys: StorageKeys, ignored: Iterable[Tensor | None]) -> None:
        super().__init__()
        self._flops_to_last_saved = 0
        self.keys = keys
        self._ignored = keys.sizes(ignored)
        self._saved: dict[int, int] = {}
        self._group: dict[int, int] = {}
        self._made: dict[int, int] = {}
        self._rise = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.keys.sizes(tree_iter((args, kwargs)))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = self.sizes(tree_iter(result))
        self._made |= {key: size for key, size in made.items() if key not in before}
        self._rise = max(self._rise, sum(self._made[k] for k in self._made if k in self._saved or k in self.keys.alive))
        return result

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True, so that a compiled branch runs compiled while it is measured: its recomputation does."""
        return True

    def saw(self, tensor: Tensor) -> None:
        """Count a tensor that is saved for the backward pass."""
        self._flops_to_last_saved = self.flops
        found = self.sizes([tensor])
        self._saved |= found
        self._group |= found

    def begin_group(self) -> None:
        """Start a new group of saved tensors."""
        self._group = {}

    def group(self) -> dict[int, int]:
        """Return the sizes of this group's storages, by number; a storage may be in several groups."""
        return self._group

    def sizes(self, tensors: Iterable[object]) -> dict[int, int]:
        """Return the sizes of the storages of tensors, by number, without those that do not count."""
        return {key: size for key, size in self.keys.sizes(tensors).items() if key not in self._ignored}

    def cost(self, xs: Sequence[Tensor], ys: Sequence[object], fresh: Sequence[Tensor], *, shared: bool) -> StepCost:
        """Return the cost of the step that was run.

        Args:
            xs: the states that it reads.
            ys: its values.
            fresh: those of the states that no earlier step has read.
            shared: the values are states that later steps read and count there; recomputation need not reach them.
        """
        inputs, new, values = (self.keys.sizes(tensors) for tensors in (xs, fresh, ys))
        reads = sum(size for key, size in new.items() if key in self._saved)
        left_out = {*inputs, *(values if shared else ())}
        saved = sum(size for key, size in self._saved.items() if key not in left_out)
        value = 0 if shared else sum(s for k, s in values.items() if k not in self._saved and k not in inputs)
        flops = self._flops_to_last_saved if shared else self.flops
        return StepCost(saved, reads, sum(new.values()), value, flops, self._rise)
