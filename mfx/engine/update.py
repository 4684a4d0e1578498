"""The autograd function of one update of x and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from mfx.engine.arithmetic import State
from mfx.engine.arithmetic.base import wide
from mfx.engine.arithmetic.signed import UpdateGamma


class UpdateContext(NamedTuple):
    """The arguments of an ``Update`` beside tensors.

    Attributes:
        state: the stream's numbers.
        kind: of the step.
        gamma: γ of the step.
        earlier: γ of the updates of the stream so far.
        dummy: the stream's ``velocity_dummy``.
        begin: for the update whose gradient arrives before all others of its stream, what to do then; else None.
    """

    state: State
    kind: str
    gamma: UpdateGamma
    earlier: list[UpdateGamma]
    dummy: Tensor
    begin: Callable[[], None] | None = None


def velocity_dummy(x: Tensor) -> Tensor:
    """Return a tensor like the velocity of a stream ``x`` that takes no memory."""
    with torch.no_grad():
        return x.new_zeros((), dtype=wide(x.dtype)).expand_as(x)


class Update(torch.autograd.Function):
    """(x, v, y) → (x + v', v') with v' = γ·v + (1−γ)·f, where f is y, or y − x for a step of kind "map".

    The numbers come from the chain's state. The next branch reads x' in the stream's dtype; v' is a dummy
    that takes no memory and carries a gradient on. The context has the attributes of ``UpdateGradients``.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, v: Tensor | None, y: Tensor, context: UpdateContext) -> tuple[Tensor, Tensor]:
        state, ctx.kind, ctx.gamma, ctx.gammas, dummy, ctx.begin = context
        ctx.number, ctx.follows = len(ctx.gammas), bool(ctx.gammas)
        ctx.gammas.append(ctx.gamma)  # by the backward pass those of later updates are there, too
        ctx.set_materialize_grads(False)
        ctx.wide, ctx.needs_v = dummy.dtype, ctx.needs_input_grad[1]
        ctx.dtypes = x.dtype, dummy.dtype if v is None else v.dtype, y.dtype
        ctx.gradients = state.gradients
        return state.advance(y, context.kind, context.gamma), dummy.detach()

    @staticmethod
    @override
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.begin is not None:
            ctx.begin()
        if gx is None and gv is None:
            return None, None, None, None
        ctx.later_gamma = ctx.gammas[min(ctx.number + 1, len(ctx.gammas) - 1)]
        return *ctx.gradients(ctx, gx, gv), None


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
