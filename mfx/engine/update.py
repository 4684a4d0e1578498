"""The autograd function of one update of x and v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mfx.engine.arithmetic import State
from mfx.engine.arithmetic.base import wide
from mfx.engine.arithmetic.gradients import UpdateGradients
from mfx.engine.arithmetic.signed import UpdateGamma

# What an ``Update`` is given beside tensors, as a plain tuple, for there is one for every step: the stream's numbers;
# the kind of the step; its γ; γ of the updates of the stream so far; the stream's ``velocity_dummy``; and what to do
# before all else in the backward pass, for the update whose gradient arrives before all others of its stream.
UpdateContext = tuple[State, str, UpdateGamma, list[UpdateGamma], Tensor, Callable[[], None] | None]


def velocity_dummy(x: Tensor) -> Tensor:
    """Return a tensor like the velocity of a stream ``x`` that takes no memory."""
    with torch.no_grad():
        return x.new_zeros((), dtype=wide(x.dtype)).expand_as(x)


class Update(torch.autograd.Function):
    """(x, v, y) → (x + v', v') with v' = γ·v + (1−γ)·f, where f is y, or y − x for a step of kind "map".

    The numbers come from the chain's state. The next branch reads x' in the stream's dtype; v' is a dummy that
    takes no memory and carries a gradient on.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, v: Tensor | None, y: Tensor, context: UpdateContext) -> tuple[Tensor, Tensor]:
        state, kind, gamma, gammas, dummy, ctx.begin = context
        number = len(gammas)
        gammas.append(gamma)  # by the backward pass those of later updates are there, too
        ctx.set_materialize_grads(False)
        dtypes = x.dtype, dummy.dtype if v is None else v.dtype, y.dtype
        ctx.update = state.gradients, kind, gamma, gammas, number, dtypes, dummy.dtype, ctx.needs_input_grad[1]
        return state.advance(y, kind, gamma), dummy.detach()

    @staticmethod
    @override
    def backward(ctx: Any, gx: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.begin is not None:
            ctx.begin()
        if gx is None and gv is None:
            return None, None, None, None
        gradients, kind, gamma, gammas, number, dtypes, wide_dtype, needs_v = ctx.update
        later_gamma = gammas[min(number + 1, len(gammas) - 1)]
        told = kind, gamma, later_gamma, number > 0, dtypes, wide_dtype, needs_v
        # Its own constructor is a call of Python.
        return *gradients(tuple.__new__(UpdateGradients, told), gx, gv), None


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
