"""One row of a profile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProfileRow:
    """A training step of one variant: forward, loss, backward.

    Attributes:
        name: of the variant.
        kept_bytes: activations alive between the forward and the backward pass.
        peak_bytes: activations alive at worst. Parameters, their gradients, buffers and inputs do not count.
        seconds: the median time of a step.
        flops: floating-point operations of a step, a multiplication and an addition counted as two.
        timeline: how far the step is (operations so far over all operations, 0 to 1) and the bytes alive then.
        forward_ends: where on that scale the backward pass begins.
        note: what was run.
    """

    name: str
    kept_bytes: int
    peak_bytes: int
    seconds: float
    flops: int
    timeline: tuple[tuple[float, int], ...]
    forward_ends: float
    note: str = ""
