"""The time that a device's bandwidth and products allow; what launches and Python cost is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from typing_extensions import override

from mfx.engine import Stream
from mfx.engine.memory.flops import FlopCounter
from mfx.engine.memory.storage import walks_back
from mfx.program.chain_call import Momentum
from mfx_passes import MfxError

BANDWIDTH, PRODUCTS = 0.85, 0.55  # shares of the peak that are reached
LINK = 25e9  # bytes per second between a device and its host, each way, that are reached


@dataclass(frozen=True)
class Chip:
    """A device.

    Attributes:
        name: as people call it.
        bandwidth: bytes per second, by its data sheet.
        products: operations per second, dense, by dtype; float32 in TF32 where there is that.
    """

    name: str
    bandwidth: float
    products: Mapping[torch.dtype, float]


def _chip(name: str, terabytes: float, half: float, single: float) -> Chip:
    return Chip(name, terabytes * 1e12, {torch.bfloat16: half * 1e12, torch.float32: single * 1e12})


H100 = _chip("H100", 3.35, 989, 494)
CHIPS = (
    _chip("H200", 4.8, 989, 494),
    H100,
    _chip("B200", 8.0, 2250, 1100),
    _chip("A100", 2.04, 312, 156),
    _chip("L40S", 0.864, 362, 183),
    _chip("4090", 1.008, 165, 82.6),
    _chip("MI300X", 5.3, 1307, 654),
)


def chip_of(name: str) -> Chip:
    """Return the chip of a name.

    Raises:
        MfxError: none is called so.
    """
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise MfxError(f"chip={name!r}: it may be one of {', '.join(chip.name for chip in CHIPS)}.")


class SecondsCounter(FlopCounter):
    """Counts floating-point operations, and sums the seconds of every operation on a chip.

    An operation takes the longer of two times: that of its products, and that of reading its arguments and writing its
    results.

    Attributes:
        seconds: of all operations so far.
    """

    def __init__(self, chip: Chip) -> None:
        super().__init__()
        self.seconds = 0.0
        self._chip = chip

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.flops
        result = super().__torch_dispatch__(func, types, args, kwargs)
        results = [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
        if results and not _is_free(func):
            moved = sum(leaf.nbytes for leaf in tree_iter((args, kwargs, results)) if isinstance(leaf, Tensor))
            peak = self._chip.products.get(results[0].dtype, self._chip.products[torch.float32])
            self.seconds += max(moved / (BANDWIDTH * self._chip.bandwidth), (self.flops - before) / (PRODUCTS * peak))
        return result


def _is_free(func: Any) -> bool:
    """True for an operation that makes a view or memory without values."""
    schema = getattr(func, "_schema", None)
    is_view = schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return is_view or "empty" in func.name() or func.name() == "aten::detach"


def bytes_of_kernels(kind: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the bytes per element and step that mfx's kernels read and write: forward, back, and for gradients.

    Exact states are int64, of which x, v and a byte of digits are read and written; float ones are two of float32. A
    step reads the branch's value and writes the stream beside them. Gradients of an update are three of float32.

    Args:
        kind: ``"exact"`` or ``"float"``.
        dtype: of the stream.
    """
    one_way = 4 * 8 + 2 + 2 * dtype.itemsize if kind == "exact" else 4 * 4 + 4
    return one_way, one_way, 3 * 4


def bytes_of_states(call: Momentum, streams: Sequence[Stream]) -> int:
    """Return the bytes that the kernels of one chain read and write in a training step at γ > 0."""
    arithmetic, total = call.settings.arithmetic, 0
    walks = walks_back(arithmetic, call.gamma, streams)
    for stream in streams:  # where inputs are kept the recurrence is computed in float32
        forward, back, gradients = bytes_of_kernels(arithmetic.name if walks else "float", stream.dtype)
        total += stream.elements * stream.updates * (forward + gradients + (back if walks else 0))
    return total
