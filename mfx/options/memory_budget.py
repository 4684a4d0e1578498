"""The memory budget of a net: a share, or a number of bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from mfx_passes import MfxError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", 1)
    for infix, base in (("i", 1024), ("", 1000))
}


@dataclass(frozen=True)
class MemoryBudget:
    """A share of the bytes that plain backpropagation keeps beyond the minimum; ``size`` bytes if ``share`` is None."""

    share: float | None
    size: int = 0

    @property
    def is_partial(self) -> bool:
        """True if some steps may keep their activations while others do not."""
        return self.share not in (0.0, 1.0)

    @classmethod
    def of(cls, value: Any) -> MemoryBudget:
        """Parse a budget: a number from 0 to 1, a number of bytes, or a text like ``"24GiB"``.

        Raises:
            MfxError: it is none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(None, _parse(value))
        if isinstance(value, int | float) and not isinstance(value, bool):
            if 0 <= value <= 1:
                return cls(float(value))
            if value > 1 and not math.isinf(value) and value == int(value):
                return cls(None, int(value))
        raise _refusal(value)

    def __str__(self) -> str:
        return f"{self.share:g}" if self.share is not None else f"{self.size} bytes"


def _parse(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    unit = next((u for u in _UNITS if found and u.lower() == found[2].lower()), None)
    if found is None or unit is None:
        raise _refusal(text)
    return int(float(found[1]) * _UNITS[unit])


def _refusal(value: Any) -> MfxError:
    return MfxError(
        f"memory_budget={value!r}: must be a share from 0.0 (keep no activations) to 1.0 (keep all), or a number of "
        "bytes above 1, such as 2 * 2**30, '24GiB' or '512 MB'."
    )
