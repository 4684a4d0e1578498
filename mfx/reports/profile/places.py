"""The places of a step's operations: module, operation and part of the step, for the tensor at the peak."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mfx.compat import NO_TASK, call_code, current_task, next_node, running_node
from mfx.modules.recomputing import recomputing
from mfx.text import size


@dataclass(frozen=True)
class _Place:
    module: str | None
    operation: str
    phase: str
    made: tuple[tuple[int, str], ...]  # bytes of a result's storage, and its type and shape


class Places(TorchDispatchMode):
    """The place of every operation: the innermost module that runs it or, in the backward pass, ran its forward.

    Args:
        net: the module that is run; None if it is not a module.
    """

    def __init__(self, net: nn.Module | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._net = net
        self._paths = {} if net is None else {id(module): path for path, module in net.named_modules()}
        self._places: list[_Place] = []
        self._forwards: dict[int, str | None] = {}  # modules by autograd's number of a node

    def describe(self, operation: int, nbytes: int) -> str:
        """Return a storage in words.

        Args:
            operation: the number of the operation that made it.
            nbytes: its size.
        """
        place = self._places[operation]
        tensor = next((text for bytes_, text in place.made if bytes_ == nbytes), "a tensor")
        return f"{size(nbytes)}, {tensor}, by {place.operation}{self._where(place.module)}, {place.phase}"

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        module = self._running()
        in_backward = current_task() != NO_TASK
        if module is None and in_backward:
            module = self._forwards.get(running_node())
        self._forwards[next_node() - 1] = module
        phase = "in the recomputation" if recomputing() else f"in the {'backward' if in_backward else 'forward'} pass"
        made = tuple((t.untyped_storage().nbytes(), _described(t)) for t in tree_iter(result) if _is_strided(t))
        self._places.append(_Place(module, func.overloadpacket.__name__, phase, made))
        return result

    def _running(self) -> str | None:
        """Return the path of the innermost module that is being called."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code is call_code():
                path: str | None = self._paths.get(id(frame.f_locals["self"]))
                if path is not None:
                    return path
            frame = frame.f_back
        return None

    def _where(self, module: str | None) -> str:
        if module is None:
            return ""
        return f" in {module or type(self._net).__name__}"


def _is_strided(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'×'.join(map(str, tensor.shape)) or 'scalar'}"
