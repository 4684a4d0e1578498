"""Fake tensors and the modes that make them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mfx.compat.aside import without_global_hooks


def fake_mode_of(tensors: Sequence[Tensor]) -> Any:
    """Return the mode in which the fake ones of some tensors were made; None if none is fake (torch 2.11 to 2.15)."""
    return torch._guards.detect_fake_mode(list(tensors))


@contextmanager
def fake_mode(mode: Any = None) -> Iterator[Any]:
    """Enter a mode in which tensors have shapes, dtypes and devices but no values.

    What fails in it is not logged, and hooks on all modules are not called. Read in torch 2.11 to 2.15.

    Args:
        mode: the mode, by default a new one.
    """
    with mode or new_fake_mode() as entered, unlogged(), without_global_hooks():
        yield entered


def new_fake_mode() -> Any:
    """Return a mode as `fake_mode` enters it, to enter several times (torch 2.11 to 2.15)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def unlogged() -> Iterator[None]:
    """Within this context, what fails on fake tensors is an exception only and is not logged to stderr as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def is_fake(value: object) -> bool:
    """True if a value is a tensor without data, made in a fake mode (torch 2.11 to 2.15)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def is_of_fakes(error: BaseException) -> bool:
    """True for an error that only tensors without data raise, or symbols for sizes (torch 2.11 to 2.15)."""
    return type(error).__module__.startswith(("torch._subclasses.", "torch.fx.experimental."))


def runs_for_real() -> bool:
    """False while torch.compile, torch.export or another fake mode traces the code (torch 2.11 to 2.15)."""
    return not torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is None
