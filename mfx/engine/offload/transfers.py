"""Copies of tensors to host memory and back, beside the computation where a device has streams."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfx.compat import current_stream, event_in, in_stream, side_stream
from mfx.ledger import uncounted

_LEAVING = 2  # tensors whose copies are under way while the computation goes on


@dataclass
class HostCopy:
    """A tensor's values in host memory.

    Attributes:
        values: the values.
        is_sound: False if the tensor was modified in place while it left, so that they may be of before or after.
    """

    values: Tensor
    is_sound: bool = True


def version_of(tensor: Tensor) -> int:
    """Return the number of changes in place that autograd knows of."""
    return 0 if tensor.is_inference() else tensor._version


class Transfers:
    """Copies between one device and the host.

    On a device with streams copies run in a stream of their own. A tensor that leaves is held until two others have
    left after it; then the computation waits for its copy, and may use its memory. What was modified in place until
    then is noted.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, side_stream(device)
        self._leaving: deque[tuple[Any, Tensor, int, HostCopy]] = deque()

    def out(self, tensor: Tensor) -> HostCopy:
        """Return a tensor's values in host memory, which they are on their way to."""
        version = version_of(tensor)
        if self._side is None:
            with uncounted():
                copy, done = HostCopy(tensor.clone()), None
        else:
            self._side.wait_stream(current_stream(self._device))
            with self._beside(), uncounted():
                copy = HostCopy(tensor.to("cpu", non_blocking=True))  # torch pins the memory that it copies to
            done = event_in(self._side, self._device)
        self._leaving.append((done, tensor, version, copy))
        self._wait(_LEAVING)
        return copy

    def settle(self) -> None:
        """Let the computation wait for all tensors that are on their way out."""
        self._wait(0)

    def _wait(self, count: int) -> None:
        while len(self._leaving) > count:
            done, tensor, version, copy = self._leaving.popleft()
            copy.is_sound = version_of(tensor) == version
            self.wait_for(done)

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """Return a tensor on the device, and the event after which its values are there; None if they are."""
        if self._side is None:
            return host.clone(), None
        tensor = torch.empty_like(host, device=self._device)  # in the memory of the computation's stream
        self._side.wait_stream(current_stream(self._device))
        with self._beside():
            tensor.copy_(host, non_blocking=True)
        tensor.record_stream(self._side)  # it may be dropped before it was used
        return tensor, event_in(self._side, self._device)

    def wait_for(self, event: Any) -> None:
        """Let the computation wait for an event."""
        if event is not None:
            current_stream(self._device).wait_event(event)

    def _beside(self) -> AbstractContextManager[Any]:
        return in_stream(self._device, self._side)
