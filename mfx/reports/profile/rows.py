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
        whole_bytes: the most bytes alive at once with them: parameters, buffers, inputs, and every gradient from the
            time on when there is one.
        seconds: median time of a step.
        flops: floating-point operations of a step, a multiplication and an addition counted as two.
        timeline: points of the share of the step's operations that ran (0 to 1) and the bytes alive then.
        forward_ends: the share at which the backward pass begins.
        note: a description of what was run.
        largest: a description of the largest activation at the peak: size, type and shape, operation, module. On a
            CPU only, else empty.
    """

    name: str
    kept_bytes: int
    peak_bytes: int
    whole_bytes: int
    seconds: float
    flops: int
    timeline: tuple[tuple[float, int], ...]
    forward_ends: float
    note: str = ""
    largest: str = ""
