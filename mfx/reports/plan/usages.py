"""The bytes and the time of a training step by each way to train, rehearsed on inputs of any size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from mfx.api import momentumize
from mfx.engine import ChainSettings
from mfx.engine.memory.flops import FlopCounter
from mfx.modules.aside import aside
from mfx.modules.kept_results import results_not_kept
from mfx.modules.tree_copy import tree_copy
from mfx.net.views import Inputs, View, views_of
from mfx.options.gamma import Gamma
from mfx.program.chain_call import Momentum
from mfx.reports.explain.estimate import Rehearsal, Usage, ViewRehearsal
from mfx.reports.explain.rehearsal import as_plain
from mfx.reports.plan.roofline import BANDWIDTH, LINK, Chip, SecondsCounter, bytes_of_states
from mfx.reports.profile.checkpoint_baseline import Checkpointed, blocks_of
from mfx_passes import MfxError

PLAIN, CHECKPOINT, ZERO, OFFLOADED = "plain", "checkpoint per block", "gamma=0", "gamma=0, offload"


@dataclass(frozen=True)
class Sizes:
    """The dimensions of inputs that may grow.

    Attributes:
        batch: size of the first dimension.
        sequence: size of the sequence's dimension; None if there is none.
    """

    batch: int
    sequence: int | None

    @staticmethod
    def of(inputs: Inputs, sequence_dim: int | None) -> Sizes:
        """Return the sizes of inputs.

        Raises:
            MfxError: no input is a tensor with a batch, or the first has no such dimension.
        """
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise MfxError("plan: no input is a tensor whose first dimension is a batch.")
        first = tensors[0]
        if sequence_dim is None:
            is_tokens = first.dim() == 2 and not first.is_floating_point()
            return Sizes(first.shape[0], first.shape[1] if is_tokens else None)
        if not 1 <= sequence_dim < first.dim():
            raise MfxError(
                f"plan: sequence_dim={sequence_dim}, where the first input has the shape {tuple(first.shape)}; it is a "
                "dimension of that, after the batch."
            )
        return Sizes(first.shape[0], first.shape[sequence_dim])

    def resized(self, inputs: Inputs, to: Sizes) -> Inputs:
        """Return inputs of other sizes, on the meta device.

        Dimensions are told by their size: a first one of the batch's size is a batch, and any other one of the
        sequence's size is a sequence, as both of a mask (tokens, tokens) are. So a dimension of features that happens
        to have the sequence's size would grow, too.
        """

        def grown(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            for dim, size in enumerate(shape):
                if dim == 0 and size == self.batch:
                    shape[dim] = to.batch
                elif size == self.sequence and to.sequence is not None:
                    shape[dim] = to.sequence
            return torch.empty(shape, dtype=tensor.dtype, device="meta").requires_grad_(tensor.requires_grad)

        resized: Inputs = pytree.tree_map_only(Tensor, grown, inputs)
        return resized


class _AsWritten(Rehearsal):
    """A rehearsal of a model's own code, with checkpoints around some of its modules."""

    def __init__(self, model: nn.Module, inputs: Inputs, blocks: tuple[str, ...]) -> None:
        super().__init__(model, *inputs)
        Checkpointed(self._net, blocks)

    @override
    def _run(self) -> Any:
        args, kwargs = self._inputs
        return self._net(*args, **kwargs)


class Usages:
    """Rehearsals of a model, by way to train and size of inputs.

    Args:
        model: as the user has it.
        inputs: arguments of a call, and those by name.
        sizes: theirs.
        gamma: γ of the last way, as in `mfx.momentumize`.
        chip: the device.

    Raises:
        MfxError: the model cannot be captured as one graph.

    Attributes:
        blocks: paths of the model's blocks.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, sizes: Sizes, gamma: Any, chip: Chip) -> None:
        model = tree_copy(model, _on_meta)  # as the inputs are: a capture may look at devices
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="mfx: .* has no chain of residual adds")  # the table says so
            self._net = momentumize(model, gamma=gamma)
        self._model, self._inputs, self._sizes, self._chip = model, inputs, sizes, chip
        self._views: dict[Sizes, View] = {}
        self._usages: dict[tuple[str, Sizes], Usage] = {}
        view = self._view(sizes)
        self.blocks = blocks_of(model, [view])
        self.momentum = f"gamma={gamma:g}" if isinstance(gamma, float | int) else f"gamma={gamma}"

    @property
    def ways(self) -> tuple[str, ...]:
        """The names of the ways."""
        return (PLAIN, CHECKPOINT, ZERO, OFFLOADED, self.momentum)

    def usage(self, way: str, sizes: Sizes) -> Usage:
        """Return the bytes and operations of a training step."""
        if (way, sizes) not in self._usages:
            rehearsed = self._with_checkpoints(sizes) if way == CHECKPOINT else self._rehearsed(way, sizes)
            self._usages[way, sizes] = rehearsed
        return self._usages[way, sizes]

    def times(self, usages: Mapping[str, Usage]) -> dict[str, float]:
        """Return the time of a step by each way, relative to the plain one, at the given inputs.

        Operations take the time that the chip's bandwidth and products allow. Work that is done again takes its share
        of operations; the recurrence takes its bytes. What goes to host memory and back is copied beside the
        computation: out in the forward pass, which is a third of a step, and back in the rest.
        """
        counter = SecondsCounter(self._chip)
        self._rehearsed(PLAIN, self._sizes, counter)
        view, plain = self._view(self._sizes), usages[PLAIN]
        times = {way: usage.flops / max(plain.flops, 1) for way, usage in usages.items()}
        moved = sum(
            bytes_of_states(call, view.streams.get(call.chain, call.streams))
            for call in view.all_calls.values()
            if not call.gamma.is_zero
        )
        times[self.momentum] += moved / (BANDWIDTH * self._chip.bandwidth) / counter.seconds
        copied = (usages[ZERO].kept - usages[OFFLOADED].kept) / LINK / counter.seconds
        forward = 1 / 3
        times[OFFLOADED] = max(forward, copied) + max(times[OFFLOADED] - forward, copied)
        return times

    def _with_checkpoints(self, sizes: Sizes) -> Usage:
        with aside(self._model), results_not_kept(self._model):
            return _AsWritten(self._model, self._at(sizes), self.blocks).training_step()[0]

    def _rehearsed(self, way: str, sizes: Sizes, counter: FlopCounter | None = None) -> Usage:
        view = self._view(sizes)
        with aside(view.module), results_not_kept(view.module):
            rehearsal = ViewRehearsal(view, *self._at(sizes), settings=_SETTINGS.get(way), counter=counter)
            return rehearsal.training_step()[0]

    def _at(self, sizes: Sizes) -> Inputs:
        return self._sizes.resized(self._inputs, sizes)

    def _view(self, sizes: Sizes) -> View:
        if sizes not in self._views:
            args, kwargs = self._at(sizes)
            views = views_of(self._net, args, kwargs, "mfx.plan(model, inputs)")
            if len(views) != 1 or not views[0].is_whole:
                raise MfxError(
                    f"plan: {type(self._model).__name__} cannot be captured as one graph, and only that can be "
                    "rehearsed. mfx.explain says which line breaks it."
                )
            self._views[sizes] = views[0]
        return self._views[sizes]


def _on_meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, tensor.requires_grad)
    return moved.requires_grad_(tensor.requires_grad)


def _at_zero(call: Momentum, *, offload: bool = False) -> ChainSettings:
    return replace(call.settings, gamma=Gamma(0, 1), offload=offload)


def _offloaded(call: Momentum) -> ChainSettings:
    return _at_zero(call, offload=True)


_SETTINGS: Mapping[str, Callable[[Momentum], ChainSettings]] = {PLAIN: as_plain, ZERO: _at_zero, OFFLOADED: _offloaded}
