"""Attributes looked up in one place first and in a second one otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Scope:
    """The object whose attributes a graph reads and calls by path.

    Args:
        attributes: what it has itself.
        fallback: object under whose attributes everything else is found.
    """

    def __init__(self, attributes: Mapping[str, Any], fallback: object = None) -> None:
        self.__dict__.update(attributes)
        self.__fallback = fallback

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__fallback, name)
