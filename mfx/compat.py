"""Every torch private that mfx leans on, with the version it was read in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

__all__ = [
    "NO_TASK",
    "autocast_now",
    "current_task",
    "fake_mode",
    "is_sharded",
    "plain_transformer_layers",
    "runs_for_real",
    "when_task_ends",
]

NO_TASK = -1


def current_task() -> int:
    """A number for the backward pass that this thread is in, ``NO_TASK`` outside one (torch 2.11 to 2.15)."""
    return torch._C._current_graph_task_id()


def when_task_ends(callback: Callable[[], None]) -> None:
    """Have ``callback`` called when the backward pass that this thread is in has ended (torch 2.11 to 2.15)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def autocast_now(device_type: str) -> Callable[[], AbstractContextManager[object]]:
    """A context that puts autocast for ``device_type`` back into its present state."""
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, which FSDP2 swaps for plain tensors while it computes."""
    return hasattr(tensor, "device_mesh")


@contextmanager
def plain_transformer_layers() -> Iterator[None]:
    """Have ``nn.TransformerEncoderLayer`` go the way that training takes, without its fused shortcut for inference.

    The shortcut decides by looking at shapes, which a symbolic trace does not have (torch 2.11 to 2.15).
    """
    from torch.nn.modules import transformer

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The length is asked for by nothing but the guess whether a mask is causal: a hint that changes no value.
        with (
            patch.object(transformer, "_get_seq_len", lambda src, batch_first: None),
            patch.object(
                transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True
            ),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def fake_mode() -> Iterator[Any]:
    """A mode in which tensors have shapes, dtypes and devices but no values; what fails in it is not logged.

    Read in torch 2.11 to 2.15.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        log.disabled = disabled


def runs_for_real() -> bool:
    """False while torch.compile, torch.export or another fake mode looks at the code instead of running it."""
    return not torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is None
