"""Triton: where it can run. Imported lazily, for it takes its time (read in Triton 3.6 to 3.9)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton() -> bool:
    """True if Triton can be imported."""
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """True if kernels that are defined now run in Triton's interpreter: TRITON_INTERPRET=1."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def compiles_for(device: torch.device) -> bool:
    """True if Triton compiles for this device, float64 included.

    Tests compile the kernels for NVIDIA's and AMD's devices without one. For Intel's (XPU) nothing has been compiled:
    that part of Triton is a package of its own, which only torch's builds for such devices bring.
    """
    if not has_triton():
        return False
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type == "xpu" and torch.xpu.is_available() and bool(torch.xpu.get_device_properties(device).has_fp64)
