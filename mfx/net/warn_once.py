"""Warnings that a net gives once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


class WarnOnce:
    """Warns, once per message."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, message: str) -> None:
        """Warn unless the message was given before."""
        if self.new([message]):
            warnings.warn(f"mfx: {message}", stacklevel=2)

    def new(self, messages: Iterable[str]) -> list[str]:
        """Return the messages that were not given before; from now on they were."""
        new = [message for message in messages if message not in self._given]
        self._given.update(new)
        return new
