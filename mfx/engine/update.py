"""The autograd function of one update of x and v."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from mfx.engine.arithmetic import State
from mfx.engine.arithmetic.base import wide
from mfx.options.gamma import Gamma

if TYPE_CHECKING:
    from mfx.engine.recompute.tape import Tape


class UpdateContext(NamedTuple):
    """The arguments of an ``Update`` beside tensors.

    Attributes:
        state: the chain's numbers.
        kind: of the step.
        gamma: γ of the step.
        later_gamma: γ of the steps after this one.
        follows: whether there is a step before this one.
        dummy: the chain's ``velocity_dummy``.
        tape: the chain's tape, for the update whose gradient arrives before all others; else None.
    """

    state: State
    kind: str
    gamma: Gamma
    later_gamma: Gamma
    follows: bool
    dummy: Tensor
    tape: Tape | None = None


def velocity_dummy(x: Tensor) -> Tensor:
    """Return a tensor like the velocity of a stream ``x`` that takes no memory."""
    with torch.no_grad():
        return x.new_zeros((), dtype=wide(x.dtype)).expand_as(x)


class Update(torch.autograd.Function):
    """(x, v, y) → (x + v', v') with v' = γ·v + (1−γ)·f, where f is y, or y − x for a step of kind "map".

    The numbers come from the chain's state. The next branch reads x' in the stream's dtype; v' is a dummy
    that takes no memory and carries a gradient on. With g = ∂/∂x' + ∂/∂v' that of v is γ·g, and that of the
    branch's value is (1−γ)·g. From update to update the second is carried for both, so that they are one tensor; the
    first is γ/(1−γ) times that. At γ = 1, where the second is zero, it is g that is carried.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, v: Tensor | None, y: Tensor, context: UpdateContext) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.gamma, ctx.kind, ctx.tape = context.gamma, context.kind, context.tape
        ctx.later_gamma, ctx.follows, ctx.wide = context.later_gamma, context.follows, context.dummy.dtype
        ctx.dtypes = x.dtype, context.dummy.dtype if v is None else v.dtype, y.dtype
        return context.state.advance(y, context.kind, context.gamma), context.dummy.detach()

    @staticmethod
    @override
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.tape is not None:
            ctx.tape.begin()
        x_dtype, v_dtype, y_dtype = ctx.dtypes
        gamma, later = ctx.gamma, ctx.later_gamma
        if gv is None:
            if gx is None:
                return None, None, None, None
            g = _as(ctx.wide, gx)
        else:
            ratio = later.value / _carried(later)
            g = gv * ratio if gx is None else torch.add(gx, gv, alpha=ratio)
        carried = g * _carried(gamma)
        gy = _as(y_dtype, carried if gamma.complement else torch.zeros_like(g))
        if ctx.kind == "map":
            gx = -gy if gx is None else gx - gy
        gx = None if gx is None else _as(x_dtype, gx)
        if ctx.needs_input_grad[1]:
            gv = _as(v_dtype, carried if ctx.follows else g * gamma.value)
        return gx, gv if ctx.needs_input_grad[1] else None, gy, None


def _carried(gamma: Gamma) -> float:
    """Return the share of g that is carried from the update of a step with this γ to the one before."""
    return gamma.complement or 1.0


def _as(dtype: torch.dtype, g: Tensor) -> Tensor:
    return g if g.dtype is dtype else g.to(dtype)


class Enter(torch.autograd.Function):
    """x → x rounded to the chain's arithmetic; the gradient passes unchanged."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, state: State) -> Tensor:
        return state.stream()

    @staticmethod
    @override
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
