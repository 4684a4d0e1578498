"""Bytes of activations alive, now and at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mfx.compat import memory_of

__all__ = ["ActivationMeter", "StorageLedger", "storages"]


class ActivationMeter:
    """Measures the bytes of activations alive inside a ``with`` block, through forward and backward.

    On a CPU every storage that a torch operation creates inside the block counts, with its whole size, from the
    operation's return until the storage is freed: what autograd saved, gradients in flight, the output, anything
    that is still referenced. A storage counts once, however many views it has. Not counted are

    * what existed before the block (parameters, inputs, buffers), also when seen through a view or changed in place;
    * the tensors in ``exclude`` and the ``.grad`` that autograd leaves on them. Only the accumulated gradient is left
      out: one that is held back to be accumulated later counts like any other tensor;
    * scratch memory within one operation, and all but the results of an operation that is opaque to torch's dispatcher
      (a custom operator, a compiled graph);
    * tensors without a storage of their own (sparse, MKL-DNN), or with an empty one (meta and fake tensors).

    On a CUDA device the caching allocator's numbers are used, relative to those at the block's start: scratch memory
    and opaque operations count, sizes are rounded up as the allocator does, and the device's peak statistics are reset.

    Args:
        exclude: tensors that never count, nor does their ``.grad``; usually ``model.parameters()``.
        count_grads: count the ``.grad`` of ``exclude`` after all.
        timeline: keep ``.timeline``.
        device: the device to measure on; by default the device of the first tensor in ``exclude``, else the CPU.

    Raises:
        ValueError: the device is neither CPU nor CUDA.

    >>> x = torch.zeros(256, requires_grad=True)  # 1 KiB
    >>> with ActivationMeter() as meter:
    ...     y = x.tanh().tanh().tanh()  # tanh keeps its output for the backward pass
    >>> meter.live, meter.peak
    (3072, 3072)
    """

    def __init__(
        self,
        exclude: Iterable[torch.Tensor] = (),
        *,
        count_grads: bool = False,
        timeline: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        excluded = tuple(exclude)
        where = torch.device(device or (excluded[0].device if excluded else "cpu"))
        if where.type not in ("cpu", "cuda"):
            raise ValueError(f"ActivationMeter measures on CPU and CUDA devices, not on {where}")
        grad_owners = () if count_grads else tuple(t for t in excluded if t.is_leaf and t.requires_grad)
        self._ledger: StorageLedger | _AllocatorLedger
        if where.type == "cpu":
            self._ledger = StorageLedger(excluded, grad_owners, timeline)
        else:
            self._ledger = _AllocatorLedger(where, grad_owners, timeline)
        self._grad_owners = grad_owners
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def live(self) -> int:
        """Bytes alive now; after the block, those of its storages that are still alive."""
        return self._ledger.live

    @property
    def peak(self) -> int:
        """The largest ``live`` there has been inside the block."""
        return self._ledger.peak

    @property
    def timeline(self) -> Sequence[int]:
        """``live`` after each operation, in order; empty unless asked for."""
        return self._ledger.timeline

    def __enter__(self) -> ActivationMeter:
        self._hooks = [p.register_post_accumulate_grad_hook(self._ledger.leave_out_grad) for p in self._grad_owners]
        self._ledger.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ledger.__exit__(kind, error, traceback)
        for hook in self._hooks:
            hook.remove()


class StorageLedger(TorchDispatchMode):
    """Every storage born under this mode, by the address of its C++ object, with its size.

    The reference to the storage's Python object is weak; torch keeps that object alive exactly as long as the storage.
    """

    def __init__(self, excluded: Sequence[torch.Tensor], grad_owners: Sequence[torch.Tensor], timeline: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.timeline: list[int] = []
        self._keep_timeline = timeline
        self._excluded = (*excluded, *(p.grad for p in grad_owners))
        self._never: frozenset[int] = frozenset()
        self._born: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __enter__(self) -> StorageLedger:
        self._never = self._keys(self._excluded)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # An argument's storage existed before, unless its creation was seen. (torch.tensor() creates one unseen, then
        # lifts it.)
        before = frozenset() if func in _LIFTS else self._keys(tree_iter((args, kwargs)))
        result = func(*args, **kwargs)
        for storage in self._storages(tree_iter(result)):
            key = memory_of(storage)
            if key in self._born or (key not in before and key not in self._never):
                self._enter(key, storage)
        self.peak = max(self.peak, self.live)
        if self._keep_timeline:
            self.timeline.append(self.live)
        return result

    def leave_out_grad(self, owner: torch.Tensor) -> None:
        """Stop counting the gradient that autograd has left on a parameter."""
        for storage in self._storages([owner.grad]):
            self._forget(memory_of(storage))

    def _storages(self, leaves: Iterable[object]) -> Iterator[torch.UntypedStorage]:
        """Return the storages of ``leaves`` that count."""
        return (storage for storage in storages(leaves) if storage.device.type != "meta")

    def _keys(self, leaves: Iterable[object]) -> frozenset[int]:
        return frozenset(memory_of(storage) for storage in self._storages(leaves))

    def _enter(self, key: int, storage: torch.UntypedStorage) -> None:
        self._forget(key)  # its size may have changed
        size = storage.nbytes()
        self._born[key] = weakref.ref(storage, lambda _: self._forget(key)), size
        self.live += size

    def _forget(self, key: int) -> None:
        _, size = self._born.pop(key, (None, 0))
        self.live -= size


_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


def storages(leaves: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors among ``leaves`` that have one of their own."""
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()


class _AllocatorLedger:
    """The caching allocator's count since entering, less the gradients that have been left out.

    The allocator has one peak since its last reset, gradients included; so it is read, and reset, each time the
    number of bytes left out changes.
    """

    _BLOCK = 512  # bytes; the allocator rounds every request up to a multiple of them

    def __init__(self, device: torch.device, grad_owners: Sequence[torch.Tensor], timeline: bool) -> None:
        self.timeline: list[int] = []
        self._sampler = _Sampler(self) if timeline else None
        self._device = device
        self._grads = {id(p): self._grad_bytes(p) for p in grad_owners}
        self._left_out = sum(self._grads.values())
        self._base = 0
        self._peak = 0
        self._inside = False

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._base - self._left_out

    @property
    def peak(self) -> int:
        if self._inside:
            self._read_peak()
        return self._peak

    def leave_out_grad(self, owner: torch.Tensor) -> None:
        self._read_peak()
        self._left_out -= self._grads[id(owner)]
        self._grads[id(owner)] = self._grad_bytes(owner)
        self._left_out += self._grads[id(owner)]

    def __enter__(self) -> None:
        self._base = torch.cuda.memory_allocated(self._device) - self._left_out
        torch.cuda.reset_peak_memory_stats(self._device)
        self._inside = True
        if self._sampler is not None:
            self._sampler.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        if self._sampler is not None:
            self._sampler.__exit__(*error)  # type: ignore[no-untyped-call]
        self._read_peak()
        self._inside = False

    def _read_peak(self) -> None:
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device) - self._base - self._left_out)
        torch.cuda.reset_peak_memory_stats(self._device)

    def _grad_bytes(self, owner: torch.Tensor) -> int:
        return sum(-(-s.nbytes() // self._BLOCK) * self._BLOCK for s in storages([owner.grad]))


class _Sampler(TorchDispatchMode):
    """Reads an allocator's count after each operation; the allocator keeps it on the host, so nothing waits."""

    def __init__(self, ledger: _AllocatorLedger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._ledger.timeline.append(self._ledger.live)
        return result
