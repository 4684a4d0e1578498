"""Look a name up in one place first and in a second one otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Scope:
    """Where a rewritten graph finds its modules: the calls first, then the holder of all else."""

    __slots__ = ("_calls", "_holder")

    def __init__(self, holder: Any, calls: Mapping[str, Any]) -> None:
        self._holder = holder
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return self._calls[name] if name in self._calls else getattr(self._holder, name)
