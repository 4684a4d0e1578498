"""A row of a profile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProfileRow:
    """A training step of one variant: forward, loss, backward.

    Attributes:
        name: name of the variant.
        kept_bytes: bytes of activations alive between the forward and the backward pass.
        peak_bytes: bytes of activations alive at the peak. Parameters, their gradients, buffers and inputs do not
            count.
        seconds: median time of a step.
        flops: floating-point operations of a step, a multiplication and an addition counted as two.
        timeline: points of the share of the step's operations that ran (0 to 1) and the bytes alive then.
        forward_ends: the share at which the backward pass begins.
        note: a description of what was run.
    """

    name: str
    kept_bytes: int
    peak_bytes: int
    seconds: float
    flops: int
    timeline: tuple[tuple[float, int], ...]
    forward_ends: float
    note: str = ""
