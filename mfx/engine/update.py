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
    that takes no memory and carries a gradient on. The context has the attributes of ``UpdateGradients``.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, v: Tensor | None, y: Tensor, context: UpdateContext) -> tuple[Tensor, Tensor]:
        state, ctx.kind, ctx.gamma, ctx.later_gamma, ctx.follows, dummy, ctx.tape = context
        ctx.set_materialize_grads(False)
        ctx.wide, ctx.needs_v = dummy.dtype, ctx.needs_input_grad[1]
        ctx.dtypes = x.dtype, dummy.dtype if v is None else v.dtype, y.dtype
        ctx.gradients = state.gradients
        return state.advance(y, context.kind, context.gamma), dummy.detach()

    @staticmethod
    @override
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.tape is not None:
            ctx.tape.begin()
        if gx is None and gv is None:
            return None, None, None, None
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
