"""Floating-point operations of what runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from mfx.flops import flops_of

__all__ = ["FlopCount"]


class FlopCount(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside of it.

    Unlike torch's own counter it does not follow modules, whose hooks a step that runs twice would confuse.

    Attributes:
        total: operations so far, a multiplication and an addition counted as two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, result)
        return result
