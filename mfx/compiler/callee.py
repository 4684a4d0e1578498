"""The protocol through which compiled code sees the net that it calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from mfx.modules.state_lock import StateLock


class Callee(Protocol):
    """A net's forward, as seen by code that torch.compile compiles."""

    net: nn.Module
    key: str
    lock: StateLock
    call_sites: list[Any]
    bypassed: int

    @property
    def is_opaque(self) -> bool:
        """True if compiled code may call the net as one operation."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: Any = ...) -> Any:
        """Run the net by functions that ``compiler`` makes of graphs."""

    def refuse_copies(self) -> None:
        """Check that it is known which module was called; raise an `MfxError` if not."""

    def warn(self, message: str) -> None:
        """Warn, once per message."""
