"""The choice between Triton's kernels and torch's operations, which give the same integers."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from mfx.compat.triton import compiles_for, has_triton
from mfx.engine.arithmetic.base import State
from mfx.engine.arithmetic.blocks import is_single
from mfx_passes.errors import MfxError

_CHOICES = ("auto", "torch", "triton")


def choose(arithmetic: type[State], x: Tensor) -> type[State]:
    """Return the class for the states of a chain: by Triton where it serves the stream's device, else ``arithmetic``.

    The environment variable MFX_KERNELS says "auto" (default), "torch" or "triton", for debugging and tests.

    Args:
        arithmetic: as it is computed by operations of torch.
        x: the stream.

    Raises:
        MfxError: MFX_KERNELS is something else, or "triton" where Triton does not run.
    """
    choice = os.environ.get("MFX_KERNELS", "auto")
    if choice not in _CHOICES:
        raise MfxError(f"MFX_KERNELS is {choice!r}; it may be one of {', '.join(map(repr, _CHOICES))}, or not set")
    if choice == "torch" or (choice == "auto" and x.device.type == "cpu"):
        return arithmetic
    if not is_single(x):
        return arithmetic
    reason = _refusal(x.device)
    if reason is not None:
        if choice == "triton":
            raise MfxError(f"MFX_KERNELS=triton: {reason}. Set MFX_KERNELS=auto")
        return arithmetic
    from mfx.engine.arithmetic.triton_states import STATES

    return STATES[arithmetic]


@cache
def _refusal(device: torch.device) -> str | None:
    """Return why Triton does not serve a device; None if it does. If only trying shows it, warn."""
    if not has_triton():
        return "the package triton is not installed"
    from mfx.compat.triton import is_interpreted

    if device.type == "cpu":
        if is_interpreted():
            return None
        return (
            "on a CPU Triton runs in its interpreter only, if TRITON_INTERPRET=1 is set before anything imports triton"
        )
    if not compiles_for(device):
        return f"Triton does not compile for {device}"
    from mfx.engine.arithmetic.triton_states import try_on

    try:
        try_on(device)
    except Exception as error:  # a compiler may be missing, for example
        reason = f"Triton fails on {device} ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        warnings.warn(
            f"mfx: {reason}: the recurrence runs by operations of torch, with the same values but a "
            "launch for each of them. MFX_KERNELS=torch asks for that without this warning",
            stacklevel=2,
        )
        return reason
    return None
