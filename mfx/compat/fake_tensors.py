"""Fake tensors and the modes that make them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def fake_mode_of(tensors: Sequence[Tensor]) -> Any:
    """The mode in which tensors without values were made, None if there are none (torch 2.11 to 2.15)."""
    return torch._guards.detect_fake_mode(list(tensors))


@contextmanager
def fake_mode() -> Iterator[Any]:
    """A mode in which tensors have shapes, dtypes and devices but no values; what fails in it is not logged.

    Read in torch 2.11 to 2.15.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, unlogged():
        yield mode


@contextmanager
def unlogged() -> Iterator[None]:
    """Within this context, what fails on tensors without values is an exception alone, and no lines on stderr, too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def is_fake(value: object) -> bool:
    """Whether a value is a tensor without data, made in a fake mode (torch 2.11 to 2.15)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def runs_for_real() -> bool:
    """False while torch.compile, torch.export or another fake mode looks at the code instead of running it."""
    return not torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is None
