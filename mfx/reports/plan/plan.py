"""Plans training before anything is bought: what fits on a device, by each way to train."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from mfx.capture.captured import RaisedError
from mfx.net.forward import forward_of
from mfx.options.memory_budget import MemoryBudget
from mfx.options.options import call_of
from mfx.progress import waiting_for
from mfx.reports.plan.result import Plan, PlannedWay
from mfx.reports.plan.roofline import chip_of
from mfx.reports.plan.search import largest
from mfx.reports.plan.usages import OFFLOADED, ZERO, Sizes, Usages
from mfx.reports.training_state import training_state
from mfx.text import described
from mfx_passes import MfxError

_TOKENS = 64  # sequences are tried by multiples of it
_LINE = 160  # characters of a model's error


def plan(
    model: nn.Module,
    inputs: Any,
    memory: str | int = "80GiB",
    *,
    world_size: int = 1,
    fsdp: bool = False,
    gamma: Any = 0.9,
    sequence_dim: int | None = None,
    optimizer_bytes: float | None = None,
    chip: str = "H100",
) -> Plan:
    """Plan the training of a model: the most that fits on a device, by each way to train, and the time of a step.

    Nothing is computed: training steps are rehearsed on tensors without values, as `mfx.explain` does, so the model may
    be on the meta device. Every result was rehearsed, and the next larger one does not fit. The ways are plain
    training, ``torch.utils.checkpoint`` around every block, and mfx at γ = 0, at γ = 0 with ``offload="cpu"``, and at
    ``gamma``. What a device's allocator and other libraries take is not in it: leave a tenth.

    Args:
        model: the model, in training mode.
        inputs: a tensor, a tuple of arguments, or a mapping from names to them, on any device: one device's batch. The
            first dimension is the batch.
        memory: of each device: bytes, or a text such as ``"80GiB"``.
        world_size: number of devices.
        fsdp: True if they share parameters, gradients and optimizer state; False if each has all of them.
        gamma: of the last way, as in `mfx.momentumize`.
        sequence_dim: the dimension of the first input that is the sequence; by default the second of (batch, tokens),
            if it holds integers. All dimensions of inputs that have its size grow with it, those of features, too; the
            first dimension of an input is the batch's if it has that size.
        optimizer_bytes: what the optimizer keeps per parameter; by default Adam's: two moments in float32, and a copy
            in float32 of parameters of half precision.
        chip: H100, H200, B200, A100, L40S, 4090 or MI300X, by whose data sheet the time is predicted.

    Raises:
        MfxError: the model cannot be captured as one graph or rehearsed on these inputs, or an argument is wrong.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"plan takes a torch.nn.Module, not {described(model)}.")
    if forward_of(model) is not None:
        raise MfxError("plan takes the model itself, not a momentumized net: mfx.original(net).")
    if not isinstance(world_size, int) or world_size < 1:
        raise MfxError(f"world_size={world_size!r}: it is the number of devices, 1 or more.")
    limit = MemoryBudget.of(memory)
    if limit.share is not None:
        raise MfxError(f"memory={memory!r}: it is a number of bytes, such as '80GiB'.")
    if optimizer_bytes is not None and not (isinstance(optimizer_bytes, int | float) and optimizer_bytes >= 0):
        raise MfxError(f"optimizer_bytes={optimizer_bytes!r}: it is a number of bytes per parameter, 0 or more.")
    given = call_of(inputs)
    sizes = Sizes.of(given, sequence_dim)
    with waiting_for(f"planning {type(model).__name__}"):
        usages = Usages(model, given, sizes, gamma, chip_of(chip))
        state = training_state(model, optimizer=optimizer_bytes, shards=world_size if fsdp else 1, blocks=usages.blocks)
        ways = _planned(usages, sizes, state.total, limit.size)
    return Plan(type(model).__name__, chip, limit.size, world_size, sizes.batch, sizes.sequence, state, ways)


def _planned(usages: Usages, sizes: Sizes, state: float, limit: int) -> tuple[PlannedWay, ...]:
    try:
        at_given = {way: usages.usage(way, sizes) for way in usages.ways}
    except MfxError:
        raise
    except Exception as error:  # whatever the model does not do on tensors without values
        raise MfxError(f"plan: a training step cannot be rehearsed: {type(error).__name__}: {error}") from error
    times, trials = usages.times(at_given), _Trials(usages, limit - state)
    planned = []
    for way, usage in at_given.items():
        host = max(0, at_given[ZERO].kept - usage.kept) if way == OFFLOADED else 0
        batch = trials.largest(way, sizes, "batch")
        sequence = (None, None) if sizes.sequence is None else trials.largest(way, sizes, "sequence")
        needs = way, usage.kept, usage.peak, state + usage.peak, host, times[way]
        planned.append(PlannedWay(*needs, *batch, *sequence))
    return tuple(planned)


class _Largest(NamedTuple):
    """The largest size that fits.

    Attributes:
        size: 0 if none does.
        refusal: the model's error at the next one; None where memory ends it.
    """

    size: int
    refusal: str | None


class _NotAMultipleError(Exception):
    """The model refuses a size that is not a multiple of the given one, which says nothing about larger ones."""


class _Trials:
    """Searches for the largest inputs that fit.

    Args:
        usages: rehearses steps.
        room: bytes for activations.
    """

    def __init__(self, usages: Usages, room: float) -> None:
        self._usages, self._room = usages, room
        self._steps = {"batch": 1, "sequence": _TOKENS}
        self._refused: dict[str, tuple[int, str]] = {}  # the least size that the model does not take, and its error

    def largest(self, way: str, sizes: Sizes, grows: str) -> _Largest:
        """Return the largest size that fits.

        Args:
            way: the way to train.
            sizes: the given ones.
            grows: ``"batch"`` or ``"sequence"``; the other one is as given.
        """
        given = getattr(sizes, grows)

        def peak(size: int) -> float:
            if grows in self._refused and size >= self._refused[grows][0]:
                return math.inf
            try:
                return self._usages.usage(way, replace(sizes, **{grows: size})).peak
            except Exception as error:  # the model takes no inputs of this size, as where positions have a table
                if size % given:
                    raise _NotAMultipleError from error
                self._refused[grows] = size, _line(error)
                return math.inf

        try:
            found = largest(peak, self._room, given, step=self._steps[grows])
        except _NotAMultipleError:
            self._steps[grows] = given
            found = largest(peak, self._room, given, step=given)
        following = (found // self._steps[grows] + 1) * self._steps[grows]
        refused, error = self._refused.get(grows, (math.inf, None))
        return _Largest(found, error if found and refused <= following else None)


def _line(error: BaseException) -> str:
    """Return an error as one short line: its beginning says most; one of the model's own as the model raised it."""
    error = error.__cause__ or error if isinstance(error, RaisedError) else error
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}"
    return text if len(text) <= _LINE else f"{text[: _LINE - 1]}…"
