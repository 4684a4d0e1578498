"""Warnings that a net gives once."""

from __future__ import annotations

import warnings


class WarnOnce:
    """Warns, once per message.

    Attributes:
        given: the messages, and other keys that were noted by `is_new`.
    """

    def __init__(self) -> None:
        self.given: set[str] = set()

    def __call__(self, message: str) -> None:
        """Warn unless the message was given before."""
        if self.is_new(message):
            warnings.warn(f"mfx: {message}", stacklevel=2)

    def is_new(self, key: str) -> bool:
        """True the first time that it is called with this key."""
        if key in self.given:
            return False
        self.given.add(key)
        return True
