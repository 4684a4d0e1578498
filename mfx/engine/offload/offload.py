"""Host memory for what a chain keeps between forward and backward, which is fetched ahead."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mfx.compat import is_capturing, is_fake, memory_of, saves_for_others
from mfx.engine.offload.host_memory import HOST_MEMORY
from mfx.engine.offload.transfers import HostCopy, Transfers, version_of
from mfx.ledger import uncounted
from mfx_passes.errors import MfxError

LEAST = 2**20  # bytes of a tensor that is worth a copy


class _Moved:
    """A tensor in host memory.

    Attributes:
        group: number of the tensors that were kept together with it, and are needed together.
    """

    def __init__(self, tensor: Tensor, transfers: Transfers, group: int, what: str) -> None:
        self.group = group
        self._transfers, self._lock = transfers, threading.Lock()
        self._has_memory = not (tensor.is_meta or is_fake(tensor))
        if not self._has_memory:  # a rehearsal
            with uncounted():
                self._copy = HostCopy(torch.empty_like(tensor))
        else:
            HOST_MEMORY.take(self, tensor.nbytes, what)
            try:
                self._copy = transfers.out(tensor)
            except RuntimeError as error:
                raise MfxError(f"{what}: offload='cpu' finds no host memory for it ({error})") from error
        self._fetched: tuple[Tensor, Any] | None = None

    @property
    def is_sound(self) -> bool:
        """True if the tensor was not modified in place while it left."""
        return self._copy.is_sound

    def fetch(self) -> None:
        """Start the copy to the device."""
        with self._lock:
            if self._fetched is None:
                self._fetched = self._copied()

    def take(self) -> Tensor:
        """Return the tensor on the device, which is the caller's from now on: a retained graph copies it again."""
        with self._lock:
            tensor, event = self._fetched or self._copied()
            self._fetched = None
        self._transfers.wait_for(event)
        return tensor

    def _copied(self) -> tuple[Tensor, Any]:
        host = self._copy.values
        return self._transfers.back(host) if self._has_memory else (torch.empty_like(host), None)


_Kept = _Moved | tuple[Tensor, int]
_Key = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


class Offload:
    """Moves the tensors that one call of a chain keeps to host memory, and fetches them one group ahead.

    Tensors stay where they are if the caller holds them, if they are parameters, parts of others, small, or of an own
    class. It is a context around the call's forward pass.

    Args:
        name: of the chain, for messages.
        device: of its streams.
        held: tensors that the caller holds.

    Raises:
        MfxError: a graph is captured, which host memory cannot be part of.
    """

    def __init__(self, name: str, device: torch.device, held: Iterable[Tensor]) -> None:
        if is_capturing(device):
            raise MfxError(f"chain {name}: offload='cpu' cannot be captured in a graph. Leave offload out")
        self._what = f"chain {name}"
        self._transfers = Transfers(device)
        self._device = device
        self._held = {memory_of(t.untyped_storage()) for t in held if _is_dense(t)}
        self._known: dict[_Key, tuple[weakref.ref[Any], int, weakref.ref[_Moved]]] = {}
        self._groups: list[list[weakref.ref[_Moved]]] = []

    @staticmethod
    def of(name: str, device: torch.device, held: Iterable[Tensor]) -> Offload | None:
        """Return the offload of a call; None where tensors are saved for others, who keep or recompute them."""
        return None if saves_for_others() else Offload(name, device, held)

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *error: object) -> None:
        self._transfers.settle()
        self._held.clear()
        self._known.clear()

    @contextmanager
    def group(self) -> Iterator[None]:
        """Move what autograd saves in this context; it will be needed together."""
        self._groups.append([])
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> _Kept:
        version = version_of(tensor)
        if tensor.device != self._device or not _is_dense(tensor) or tensor.nbytes < LEAST:
            return tensor, version
        storage = tensor.untyped_storage()
        memory = memory_of(storage)
        if memory in self._held:
            return tensor, version
        key = memory, tensor.dtype, tensor.shape, tensor.stride()  # a view of all of a storage is another tensor
        # An address alone may be another tensor's by now.
        known = self._known.get(key)
        if known is not None and known[0]() is storage and known[1] == version and (moved := known[2]()) is not None:
            return moved
        moved = _Moved(tensor, self._transfers, len(self._groups) - 1, self._what)
        self._known[key] = weakref.ref(storage), version, weakref.ref(moved)
        self._groups[-1].append(weakref.ref(moved))
        return moved

    def _unpack(self, kept: _Kept) -> Tensor:
        if isinstance(kept, tuple):
            _check(version_of(kept[0]) == kept[1])
            return kept[0]
        _check(kept.is_sound)
        tensor = kept.take()
        if kept.group:
            for reference in self._groups[kept.group - 1]:
                if (before := reference()) is not None:
                    before.fetch()
        return tensor


def _check(is_as_saved: bool) -> None:
    if not is_as_saved:  # hooks take the check from autograd
        raise RuntimeError("a saved tensor has been modified by an inplace operation")


def _is_dense(tensor: Tensor) -> bool:
    """True for a plain tensor that is all of its storage."""
    if tensor.layout != torch.strided or isinstance(tensor, nn.Parameter):
        return False
    if type(tensor) is not Tensor and not is_fake(tensor):
        return False
    if tensor.is_neg() or tensor.is_conj():
        return False
    return tensor.nbytes > 0 and tensor.untyped_storage().nbytes() == tensor.nbytes
