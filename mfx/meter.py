"""Bytes of activations alive, now and at the peak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfx.ledger import Life, StorageLedger, gradients_left_out, storages

__all__ = ["ActivationMeter"]


class ActivationMeter:
    """Measures the bytes of activations alive inside a ``with`` block, through forward and backward.

    On a CPU every storage that a torch operation creates inside the block counts, with its whole size, from the
    operation's return until the storage is freed: what autograd saved, gradients in flight, the output, anything
    that is still referenced. A storage counts once, however many views it has. Not counted are

    * what existed before the block (parameters, inputs, buffers), also when seen through a view or changed in place;
    * the tensors in ``exclude``, and whatever is or becomes the gradient of one of them, from its first byte on: what
      autograd accumulates in ``.grad``, and what it adds up, casts or joins to it (`peak_with_grads` has it);
    * scratch memory within one operation, and all but the results of an operation that is opaque to torch's dispatcher
      (a custom operator, a compiled graph);
    * tensors without storages (MKL-DNN), or with empty ones (meta and fake tensors). A sparse tensor counts by its
      indices and values.

    On a CUDA device the caching allocator's numbers are used, relative to those at the block's start: scratch memory
    and opaque operations count, a gradient counts until it is accumulated, sizes are rounded up as the allocator does,
    and the device's peak statistics are reset.

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
        self._ledger: StorageLedger | AllocatorLedger
        if where.type == "cpu":
            self._ledger = StorageLedger((*excluded, *(p.grad for p in grad_owners)), keep_lives=timeline)
        else:
            self._ledger = AllocatorLedger(where, grad_owners, timeline)
        self._keeps_timeline = timeline
        self._grad_owners = grad_owners
        self._stack = ExitStack()

    @property
    def live(self) -> int:
        """Bytes alive now; after the block, those of its storages that are still alive."""
        return self._ledger.live

    @property
    def peak(self) -> int:
        """The largest ``live`` there has been inside the block."""
        return self._ledger.peak

    @property
    def peak_with_grads(self) -> int:
        """The most bytes alive at once inside the block, gradients of ``exclude`` among them."""
        return self._ledger.peak_with_grads

    def largest_at_peak(self) -> Life | None:
        """Return the life of the largest storage at the peak; None without ``timeline``, and on a CUDA device."""
        return self._ledger.largest_at_peak() if isinstance(self._ledger, StorageLedger) else None

    @property
    def timeline(self) -> Sequence[int]:
        """``live`` after each operation, in order; empty unless asked for."""
        return self._ledger.timeline if self._keeps_timeline else ()

    def __enter__(self) -> ActivationMeter:
        self._stack.enter_context(gradients_left_out(self._ledger, self._grad_owners))
        self._stack.enter_context(self._ledger)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


_OPEN: WeakSet[AllocatorLedger] = WeakSet()  # which read and reset a device's only peak


class AllocatorLedger:
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
        self._before = self._left_out = sum(self._grads.values())
        self._base = 0
        self._peak = self._peak_with_grads = self._top = 0
        self._inside = False
        self._laps: list[tuple[int, int]] = []
        self._start = 0

    def lap(self) -> None:
        """Begin a new lap; the first one begins by itself."""
        self._read_peak()
        self._laps.append((self._start, self._top))
        self._start = self._top = self.live

    def laps(self) -> list[tuple[int, int]]:
        """Return of each lap ``live`` at its start, and the largest."""
        if self._inside:
            self._read_peak()
        return [*self._laps, (self._start, self._top)]

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._base - self._left_out

    @property
    def peak(self) -> int:
        if self._inside:
            self._read_peak()
        return self._peak

    @property
    def peak_with_grads(self) -> int:
        if self._inside:
            self._read_peak()
        return self._peak_with_grads

    def notice_grads(self, grads: Iterable[torch.Tensor | None]) -> None:
        """Do nothing: the allocator's peak says nothing of single storages."""

    def leave_out_grad(self, owner: torch.Tensor) -> None:
        self._read_peak()
        self._left_out -= self._grads[id(owner)]
        self._grads[id(owner)] = self._grad_bytes(owner)
        self._left_out += self._grads[id(owner)]

    def __enter__(self) -> AllocatorLedger:
        self._base = torch.cuda.memory_allocated(self._device) - self._left_out
        others = [other for other in _OPEN if other._device == self._device]
        if others:
            others[0]._read_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._inside = True
        _OPEN.add(self)
        if self._sampler is not None:
            self._sampler.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._sampler is not None:
            self._sampler.__exit__(*error)  # type: ignore[no-untyped-call]
        self._read_peak()
        _OPEN.discard(self)
        self._inside = False

    def _read_peak(self) -> None:
        """Read the device's peak for all that are open on it, and reset it."""
        found = torch.cuda.max_memory_allocated(self._device)
        for ledger in {self, *(other for other in _OPEN if other._device == self._device)}:
            ledger._take(found - ledger._base)
        torch.cuda.reset_peak_memory_stats(self._device)

    def _take(self, top: int) -> None:
        self._peak = max(self._peak, top - self._left_out)
        self._top = max(self._top, top - self._left_out)
        self._peak_with_grads = max(self._peak_with_grads, top - self._before)

    def _grad_bytes(self, owner: torch.Tensor) -> int:
        return sum(-(-s.nbytes() // self._BLOCK) * self._BLOCK for s in storages([owner.grad]))


class _Sampler(TorchDispatchMode):
    """Reads an allocator's count after each operation; the allocator keeps it on the host, so nothing waits."""

    def __init__(self, ledger: AllocatorLedger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._ledger.timeline.append(self._ledger.live)
        return result
