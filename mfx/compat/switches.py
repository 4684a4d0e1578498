"""Switches of the process that code may ask for: the default dtype, and deterministic algorithms (torch 2.14)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

Switched = tuple[torch.dtype, bool, bool]


def switched() -> Switched:
    """Return how they stand now."""
    return (
        torch.get_default_dtype(),
        torch._C._get_deterministic_algorithms(),
        torch._C._get_deterministic_algorithms_warn_only(),
    )


@contextmanager
def switched_as(found: Switched) -> Iterator[None]:
    """Within this context, they stand as ``switched`` has found them."""
    before = switched()
    _switch(found)
    try:
        yield
    finally:
        _switch(before)


def _switch(found: Switched) -> None:
    dtype, deterministic, warn_only = found
    torch.set_default_dtype(dtype)
    torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)
