"""The bytes that parameters take on each device: themselves, their gradients, and what the optimizer keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

_MOMENTS = 2 * 4  # bytes per parameter: Adam's, in float32
_MASTER = 4  # bytes per parameter of half precision: its copy in float32


@dataclass(frozen=True)
class TrainingState:
    """Bytes on each device beside activations.

    Attributes:
        parameters: parameters, or a device's shards of them, and buffers.
        gradients: of the parameters, or a device's shards.
        optimizer: what the optimizer keeps, or a device's shard.
        gathered: parameters and gradients that are whole for a while under FSDP2: the root's own, those of the largest
            block, and those of the block fetched ahead of it.
    """

    parameters: float
    gradients: float
    optimizer: float
    gathered: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


def training_state(model: nn.Module, *, optimizer: float | None, shards: int, blocks: Iterable[str]) -> TrainingState:
    """Return the bytes that a model takes on each device.

    Args:
        model: the model; its dtypes count, its device does not.
        optimizer: bytes per trained parameter; None for Adam: two moments in float32, and a copy in float32 of what
            has fewer bytes.
        shards: number of devices that share parameters, gradients and optimizer state.
        blocks: paths of the modules that are gathered one after the other.
    """
    parameters, buffers = list(model.parameters()), sum(buffer.nbytes for buffer in model.buffers())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    whole = sum(parameter.nbytes for parameter in parameters)
    gradients = sum(parameter.nbytes for parameter in trained)
    kept = sum(p.numel() * (_adam(p) if optimizer is None else optimizer) for p in trained)
    if shards == 1:
        return TrainingState(whole + buffers, gradients, kept)
    sizes = [sum(p.nbytes for p in model.get_submodule(path).parameters()) for path in blocks]
    gathered = 2 * (whole - sum(sizes)) + 2 * 2 * max(sizes, default=0)  # parameters and gradients
    return TrainingState(whole / shards + buffers, gradients / shards, kept / shards, gathered)


def _adam(parameter: nn.Parameter) -> int:
    return _MOMENTS + (_MASTER if parameter.itemsize < _MASTER else 0)
