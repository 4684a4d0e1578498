"""Handles, which stand for the saved tensors of a branch, and the tensors that recomputation gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from mfx.compat import NO_TASK, current_stream, current_task, in_stream, make_ready, when_task_ends
from mfx.modules.state_lock import Section, StateLock
from mfx_passes.errors import MfxError

Packed = tuple["ref[Handle]", torch.Size, torch.dtype]
_first = itemgetter(0)
_referred: Any = ref.__call__  # at C speed in map
_BUSY = NO_TASK - 1  # as the number of no backward pass


class Handle:
    """Stands in the autograd graph for one saved tensor of a branch.

    When autograd frees a node, it frees the node's handles, and the tensors that were rebuilt for them. There is one
    for every saved tensor of a net, so it is small, and made without a call of Python.

    Attributes:
        tensor: the tensor, while it is there; set to None by who makes the handle.
        version: that of the tensor when it was saved; as ``made_in``, there when the tensor is.
        made_in: the stream that it was made in, if that is not the CPU.
    """

    __slots__ = ("__weakref__", "made_in", "tensor", "version")

    tensor: Tensor | None
    version: int
    made_in: Any


class Rebuilt:
    """The tensors that recomputation has given to handles, for one backward pass and no longer than needed.

    Nodes of the graph that lie on several devices, or in several streams of one, ask from several threads, or streams.
    One thread at a time rebuilds, in the stream of the forward pass. While it waits for autograd, which a branch may
    use itself, another one may: autograd may need that thread.

    Args:
        device: of the chain's stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._task = NO_TASK
        self.provided: list[list[Packed]] = []  # the handles that have tensors
        self._given_in = _BUSY  # the backward pass in which the tensors are all there
        self._is_busy, self._lock = False, StateLock()
        self._device, self._stream = device, current_stream(device)

    def provide(self, rebuild: Callable[[], None], handle: Handle) -> Tensor:
        """Return the tensor behind ``handle``, after ``rebuild`` if it is not there.

        Raises:
            MfxError: the tensor was changed after it was saved.
        """
        tensor = handle.tensor
        # What a thread sees while another one rebuilds may not be complete: rrelu fills a tensor after saving it.
        if tensor is None or current_task() != self._given_in:
            tensor = self._rebuilt(rebuild, handle)
        if tensor is None:
            raise MfxError(
                "a recomputation ended before it had saved all that the forward pass saved. A step must do the same "
                "both times: see that it depends on nothing that changed in between, or skip it"
            )
        if tensor._version != handle.version:
            raise MfxError(
                f"a step changes in place a tensor of shape {tuple(tensor.shape)} that its backward pass needs, as in "
                "y = x.exp(); y.mul_(2), which is an error without mfx, too. Make the later operation out of place"
            )
        if handle.made_in is not None:
            make_ready(tensor, handle.made_in)
        return tensor

    def _rebuilt(self, rebuild: Callable[[], None], handle: Handle) -> Tensor | None:
        with Section(self._lock, writes=True, recomputes=True):
            if (task := current_task()) != self._task:
                self._enter(task)
            if handle.tensor is None:
                was_busy, self._is_busy, self._given_in = self._is_busy, True, _BUSY
                try:
                    if self._stream is None:  # as on a CPU
                        rebuild()
                    else:
                        with in_stream(self._device, self._stream):
                            rebuild()
                finally:
                    self._is_busy = was_busy
            tensor = handle.tensor
            if self._task == NO_TASK:
                self.clear()
            elif not self._is_busy:
                self._given_in = self._task
        return tensor

    def clear(self) -> None:
        """Drop the tensors; handles that are needed once more are rebuilt once more."""
        handles: Iterable[Handle] = filter(None, map(_referred, map(_first, chain.from_iterable(self.provided))))
        for handle in handles:
            handle.tensor = None
        self.provided.clear()

    def _enter(self, task: int) -> None:
        # Tensors rebuilt in another pass are not used here: parameters may have changed since, which a rebuild checks.
        self.clear()
        self._task, self._given_in = task, _BUSY
        if task != NO_TASK:
            when_task_ends(partial(_clear_after, ref(self), task))


def _clear_after(this: ref[Rebuilt], task: int) -> None:
    rebuilt = this()
    if rebuilt is not None and rebuilt._task == task:
        rebuilt.clear()
        rebuilt._task, rebuilt._given_in = NO_TASK, _BUSY
