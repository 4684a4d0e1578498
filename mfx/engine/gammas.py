"""γ of every update in one call of a chain: settled once, when the call begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfx.compat import is_sharded, reads_in_parts
from mfx.engine.arithmetic.signed import Signed, UpdateGamma
from mfx.engine.steps import ChainCall, StepFunction
from mfx.options.gamma import Drawn, Gamma
from mfx.text import listed
from mfx_passes.errors import MfxError
from mfx_passes.paths import resolve

_ZERO = Gamma(0, 1)


def gammas_of(call: ChainCall, xs: Sequence[Tensor]) -> list[list[UpdateGamma]]:
    """Return γ of each update of each step; signs are drawn, from the default generator of the streams' device.

    Raises:
        MfxError: signs are to be drawn for the rows of a dimension that the streams do not have in common.
    """
    gamma = call.settings.gamma
    gammas: list[list[UpdateGamma]] = [[gamma] * len(step.writes) for step in call.steps]
    if gamma.has_signs:
        drawn = gamma.drawn
        assert drawn is not None, "γ has signs"
        for step, own, draw in zip(call.steps, gammas, _draw(call, xs, drawn), strict=True):
            dims = (xs[stream].dim() for stream in step.writes)
            own[:] = [Signed(gamma, draw, drawn.dim % dim if dim else 0) for dim in dims]
    if gamma.has_signs or call.settings.velocity == "residual":
        _set_first(call.steps, gammas)
    return gammas


def _set_first(steps: Sequence[StepFunction], gammas: Sequence[list[UpdateGamma]]) -> None:
    """Let the first update of each stream have γ = 0."""
    moved: set[int] = set()
    for step, own in zip(steps, gammas, strict=True):
        own[:] = [gamma if stream in moved else _ZERO for stream, gamma in zip(step.writes, own, strict=True)]
        moved.update(step.writes)


def _draw(call: ChainCall, xs: Sequence[Tensor], drawn: Drawn) -> Sequence[Tensor]:
    """Return the draws of each step: of shape (), or (batch,)."""
    _refuse_replicas(call, xs)
    shape: tuple[int, ...] = (len(call.steps),)
    if drawn.per == "sample":
        shape = (*shape, _batch(call, xs, drawn.dim))
    return torch.randint(0, 2, shape, device=xs[0].device).unbind()


def _refuse_replicas(call: ChainCall, xs: Sequence[Tensor]) -> None:
    """Refuse streams that several processes compute together: each would draw signs of its own.

    Raises:
        MfxError: parameters, or the streams themselves, are DTensors.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    read = [resolve(call.root, target) for step in call.steps for target in step.targets]
    around = [resolve(call.root, container.path) for container in call.containers]
    if any(map(is_sharded, xs)) or reads_in_parts(read, around):
        raise MfxError(
            f"chain {call.name}: gamma=mfx.BDIA(...), and its parameters or streams are spread over processes (tensor "
            "parallelism), of which each would draw other signs for the same stream. Give this chain a number as gamma."
        )


def _batch(call: ChainCall, xs: Sequence[Tensor], dim: int) -> int:
    if any(not -x.dim() <= dim < x.dim() or x.shape[dim] != xs[0].shape[dim] for x in xs):
        raise MfxError(
            f"chain {call.name}: gamma=mfx.BDIA(per='sample', dim={dim}) draws signs for each row of dimension {dim}, "
            f"which is not the batch of all its streams (of shape {listed([str(tuple(x.shape)) for x in xs])}). Give "
            "the batch dimension as dim, or use per='call'."
        )
    return xs[0].shape[dim]
