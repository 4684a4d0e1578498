"""The backward pass of one update of x and v."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mfx.engine.arithmetic.signed import UpdateGamma, add_scaled, carried_by, multiplier, ratio_of, value_of

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class UpdateGradients(NamedTuple):
    """The backward pass of (x, v, y) → (x + v', v') with v' = γ·v + (1−γ)·f, where f is y, or y − x for a "map".

    With g = ∂/∂x' + ∂/∂v' the gradient of v is γ·g, and that of y is (1−γ)·g. From update to update the second is
    carried for both, so that they are one tensor; the first is γ/(1−γ) times that. At γ = 1, where the second is zero,
    it is g that is carried.

    Attributes:
        kind: of the step.
        gamma: γ of the step.
        later_gamma: γ of the next update of the stream.
        follows: whether there is a step before this one.
        dtypes: of x, v and y.
        wide: the dtype in which gradients are added.
        needs_v: whether v needs a gradient.
    """

    kind: str
    gamma: UpdateGamma
    later_gamma: UpdateGamma
    follows: bool
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    wide: torch.dtype
    needs_v: bool


def gradients_of(update: UpdateGradients, gx: Tensor | None, gv: Tensor | None) -> Gradients:
    """Return the gradients of x, v and y from those of x' and v', of which not both are None."""
    x_dtype, v_dtype, y_dtype = update.dtypes
    gamma = update.gamma
    if gv is None:
        assert gx is not None, "one of the outputs has a gradient"
        g = _as(update.wide, gx)
    else:
        ratio = update.later_gamma.factor(ratio_of, gv)
        g = gv * ratio if gx is None else add_scaled(gx, gv, ratio)
    share = g * multiplier(gamma, carried_by, g)
    gy = torch.zeros_like(g) if gamma.is_one else share
    gy = gy if gy.dtype is y_dtype else gy.to(y_dtype)
    if update.kind == "map":
        gx = -gy if gx is None else gx - gy
    gx = gx if gx is None or gx.dtype is x_dtype else gx.to(x_dtype)
    if not update.needs_v:
        return gx, None, gy
    return gx, _as(v_dtype, share if update.follows else g * multiplier(gamma, value_of, g)), gy


def _as(dtype: torch.dtype, g: Tensor) -> Tensor:
    return g if g.dtype is dtype else g.to(dtype)
