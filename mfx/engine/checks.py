"""Checks of a chain's streams, and of what its branches give and do to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfx.compat import has_float64
from mfx.engine.arithmetic import State
from mfx.engine.steps import ChainCall, StepFunction
from mfx.text import listed
from mfx_passes.errors import MfxError


def check_devices(call: ChainCall, arithmetic: type[State], xs: Sequence[Tensor]) -> None:
    """Raise an MfxError if the streams are on several devices, or on one without the arithmetic's numbers."""
    device = xs[0].device
    if arithmetic.needs_float64 and not has_float64(device):
        raise MfxError(
            f"chain {call.name}: arithmetic='exact' computes with float64, which {device} does not have. Use "
            "arithmetic='float'"
        )
    if any(x.device != device for x in xs):
        raise MfxError(
            f"chain {call.name}: its streams are on {listed(sorted({str(x.device) for x in xs}))}, and are walked back "
            "together. Have them on one device, or leave the chain out with skip="
        )


def check_fits(call: ChainCall, step: StepFunction, x: Tensor, y: object) -> None:
    """Raise an MfxError if ``y``, which a step's branch gave, cannot be added to the stream ``x``."""
    if type(y) is Tensor and y.shape == x.shape and y.dtype is x.dtype and y.device == x.device:
        return  # the usual case
    if not isinstance(y, Tensor):
        found = f"a {type(y).__name__}"
    elif y.shape != x.shape:
        found = f"a tensor of shape {tuple(y.shape)}"
    elif not y.is_floating_point() or (y.dtype is not x.dtype and torch.promote_types(x.dtype, y.dtype) != x.dtype):
        found = f"a tensor of dtype {y.dtype}"
    elif y.device != x.device:
        found = f"a tensor on {y.device}"
    else:
        return
    raise MfxError(
        f"chain {call.name}, step {step.path}: the branch gave {found}; it is to be added to a stream of shape "
        f"{tuple(x.shape)}, {x.dtype}, on {x.device}. Leave this step out with skip="
    )


def writes_into_stream(call: ChainCall, step: StepFunction) -> MfxError:
    """Return the error for a branch that changes a stream in place."""
    return MfxError(
        f"chain {call.name}, step {step.path}: the branch writes into the stream, which is its input, so there "
        "is no telling what is to be added to what. Have it write into a copy (x.clone()), or leave this step "
        "out with skip="
    )
