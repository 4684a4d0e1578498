"""A training step of a variant, run, timed and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx.compat import memory_of
from mfx.engine.memory.flops import FlopCounter
from mfx.ledger import storages
from mfx.meter import ActivationMeter
from mfx.reports.profile.places import Places
from mfx.reports.profile.rows import ProfileRow
from mfx.reports.profile.untouched import copy_inputs
from mfx.reports.profile.variants import Variant
from mfx_passes import MfxError

Loss = Callable[[Any], Tensor]
_POINTS = 1000  # of a timeline, at most


class TrainingStep:
    """A training step of a model on given inputs: forward, loss, backward.

    Args:
        args: the model's arguments.
        kwargs: arguments by name.
        loss: function from the model's output to a scalar; None for the default.
        device: device to measure on.
    """

    def __init__(self, args: Any, kwargs: Any, loss: Loss | None, device: torch.device) -> None:
        self._inputs = args, kwargs
        self._loss = loss
        self._device = device

    def run(self, variant: Variant) -> None:
        """Run a step.

        Raises:
            MfxError: there is nothing to differentiate.
        """
        args, kwargs = copy_inputs(*self._inputs)
        self._value(variant, args, kwargs).backward()

    def seconds(self, variant: Variant) -> float:
        """Run a step; return the seconds it took."""
        args, kwargs = copy_inputs(*self._inputs)
        self._synchronize()
        start = time.perf_counter()
        self._value(variant, args, kwargs).backward()
        self._synchronize()
        return time.perf_counter() - start

    def measured(self, variant: Variant, parameters: Sequence[Tensor]) -> ProfileRow:
        """Run a step; return its bytes and operations, without a time."""
        args, kwargs = copy_inputs(*self._inputs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        meter = ActivationMeter([*parameters, *inputs], timeline=True, device=self._device)
        places = Places(variant.net)
        with meter, FlopCounter() as counter, places:
            value = self._value(variant, args, kwargs)
            kept, forward = meter.live, len(meter.timeline)
            value.backward()
        line, largest = meter.timeline, meter.largest_at_peak()
        before = {memory_of(storage): storage.nbytes() for storage in storages([*parameters, *inputs])}
        return ProfileRow(
            variant.name,
            kept,
            meter.peak,
            meter.peak_with_grads + sum(before.values()),
            0.0,
            counter.flops,
            _thinned(line),
            forward / max(len(line), 1),
            variant.note(),
            "" if largest is None else places.describe(largest.birth, largest.size),
        )

    def _value(self, variant: Variant, args: Any, kwargs: Any) -> Tensor:
        output = variant.run(*args, **kwargs)
        value = _default_loss(output) if self._loss is None else self._loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise MfxError(f"the loss of the variant {variant.name!r} is {got}; let loss= return a scalar tensor.")
        if not value.requires_grad:
            raise MfxError(
                f"the loss of the variant {variant.name!r} depends on nothing that requires a gradient, so there is no "
                "backward pass to profile. Let some parameters or inputs require one."
            )
        return value

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _default_loss(output: Any) -> Tensor:
    """Return the output's ``.loss``, as Hugging Face models have, else the sum of its tensors that have a gradient."""
    named = getattr(output, "loss", None)
    if isinstance(named, Tensor):
        return named
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not leaves:
        raise MfxError(
            f"no floating-point tensor was found in the model's output, which is a {type(output).__name__}. Give "
            "loss=, a function from the output to a scalar."
        )
    parts = [leaf.sum() for leaf in leaves if leaf.requires_grad] or [leaves[0].sum()]
    return torch.stack([part.to(parts[0]) for part in parts]).sum() if len(parts) > 1 else parts[0]


def _thinned(live: Sequence[int]) -> tuple[tuple[float, int], ...]:
    """Return the bytes after each operation from (0, 0) on; of many operations in a row, the maximum."""
    count = len(live)
    points = min(count, _POINTS)
    runs = (range(number * count // points, (number + 1) * count // points) for number in range(points))
    worst = (max(run, key=live.__getitem__) for run in runs)
    return ((0.0, 0), *(((at + 1) / count, live[at]) for at in worst))


def parameters_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return parameters and buffers, each once."""
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    return list({id(tensor): tensor for tensor in tensors}.values())
