"""A net's forward and backward pass as opaque operations.

A compiler that traced the recomputation would silently change it: other dropout masks, statistics counted twice.
So ``mfx::run`` runs the net as it runs without a compiler, with an autograd graph of its own, and returns a token by
which ``mfx::run_backward`` finds that graph. Buffers are changed by ``mfx::settle``, the only one of the three that
declares it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfx import compat
from mfx.compiler.call_site import site_by
from mfx.compiler.site_run import SiteRun

_RUNS: dict[int, SiteRun] = {}  # runs with a backward pass still to come, by token
_NUMBERS = itertools.count()


@torch.library.custom_op("mfx::run", mutates_args=(), tags=compat.OPAQUE_TAGS)
def run(site: str, inputs: Sequence[Tensor], held: Sequence[Tensor], *, device: torch.device) -> list[Tensor]:
    """Run a net.

    Args:
        site: key of the `mfx.compiler.call_site.CallSite`.
        inputs: the tensors of the net's arguments.
        held: its parameters and buffers.
        device: device on which random numbers are drawn, for `torch.utils.checkpoint` to see.

    Returns:
        The tensors of its result, and the token of the run.
    """
    site_run = SiteRun(site_by(site), inputs, held)
    results = site_run.forward()
    number = next(_NUMBERS)
    token = torch.tensor(number)
    _RUNS[number] = site_run
    weakref.finalize(token, _RUNS.pop, number, None)  # a graph that may still run backward holds the token
    return [*results, token]


@run.register_fake
def _(site: str, inputs: Sequence[Tensor], held: Sequence[Tensor], *, device: torch.device) -> list[Tensor]:
    return [*site_by(site).infer(inputs, held), torch.empty((), dtype=torch.int64)]


@torch.library.custom_op("mfx::settle", mutates_args=("buffers",))
def settle(token: Tensor, buffers: Sequence[Tensor]) -> None:
    """Copy the buffers that a run has left to a net's buffers."""
    _RUNS[int(token)].settle(buffers)


@settle.register_fake
def _(token: Tensor, buffers: Sequence[Tensor]) -> None:
    pass


@torch.library.custom_op("mfx::run_backward", mutates_args=(), tags=compat.OPAQUE_TAGS)
def run_backward(token: Tensor, gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the tensors that a run's results depend on, laid out like ``like``."""
    number = int(token)
    keep = compat.keeps_graph()
    site_run = _RUNS[number] if keep else _RUNS.pop(number)
    return site_run.backward(gradients, like, keep=keep)


@run_backward.register_fake
def _(token: Tensor, gradients: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in like]


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: list[Tensor]) -> None:
    key, given, held = inputs
    ctx.site, ctx.counts = site_by(key), (len(given), len(held))
    leaves = [*given, *held]
    ctx.save_for_backward(output[-1], *(leaves[position] for position in ctx.site.output_spec.used))
    differentiable = {id(output[at]) for at in ctx.site.output_spec.differentiable}
    ctx.mark_non_differentiable(*(tensor for tensor in output if id(tensor) not in differentiable))


def _backward(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
    token, *like = ctx.saved_tensors
    site, (given, held) = ctx.site, ctx.counts
    wanted = [gradients[position] for position in site.output_spec.differentiable]
    found = dict(zip(site.output_spec.used, torch.ops.mfx.run_backward(token, wanted, like), strict=True))
    every = [found.get(position) for position in range(given + held)]
    return None, every[:given], every[given:]


run.register_autograd(_backward, setup_context=_save)
