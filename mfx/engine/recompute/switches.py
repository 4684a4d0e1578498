"""The switches of the thread and of the process that a branch finds, and has to find when it runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from mfx.compat import (
    NO_TASK,
    accelerator,
    autocast_as,
    autocast_reader,
    autocast_state,
    current_task,
    default_device,
    reproducible_on,
    switched,
    switched_as,
)


class Switches:
    """The switches around the branches of one call: autocast, the choice of algorithms, and those of the process.

    Args:
        device: of the stream.

    Attributes:
        reproducible: returns a context for both runs of a branch, in which they choose the same algorithms; None if
            there is nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        kinds = sorted({"cpu", device.type, accelerator() or "cpu"})
        self._autocast = {kind: autocast_state(kind) for kind in kinds if torch.amp.is_autocast_available(kind)}
        self._read = autocast_reader([*self._autocast])
        self._found, self._switched = self._read(), switched()
        self._device = default_device()
        self._task, self._differing = NO_TASK, list[Callable[[], AbstractContextManager[object]]]()
        self.reproducible = reproducible_on(device)

    def contexts(self) -> list[AbstractContextManager[object]]:
        """Return contexts for what differs now from the start of the call, and `reproducible`."""
        contexts = [] if (context := self.reproducible()) is None else [context]
        if self._read() != self._found:
            contexts += [autocast_as(kind, was) for kind, was in self._autocast.items() if autocast_state(kind) != was]
        task = current_task()
        if task != self._task or task == NO_TASK:  # once in a backward pass: there are many
            self._task, self._differing = task, [*self._differences()]
        return [*contexts, *[make() for make in self._differing]] if self._differing else contexts

    def _differences(self) -> Iterator[Callable[[], AbstractContextManager[object]]]:
        if switched() != self._switched:
            yield partial(switched_as, self._switched)
        if default_device() != self._device:
            device: Any = self._device  # a context, too
            yield lambda: device
