"""Decides what a chain keeps between forward and backward, by its cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from mfx.engine.arithmetic import State
from mfx.engine.arithmetic.floating import predict
from mfx.options.gamma import Gamma


@dataclass(frozen=True)
class Storage:
    """The ways in which one chain can store its states, their costs, and the one chosen.

    Attributes:
        policy: ``"states"``: states that are walked back; ``"inputs"``: the input of every step; ``"activations"``: all
            that autograd saves, nothing is recomputed.
        states: bytes that states take (with the store of digits, or with anchors); infinite where walking back is
            impossible.
        inputs: bytes that the steps' inputs take.
        anchors: stored states beside the end state.
        error: predicted relative error in a rebuilt state.
    """

    policy: str
    states: float
    inputs: float
    anchors: int
    error: float


@dataclass(frozen=True)
class Stream:
    """One stream of a chain: shape and dtype of its state, and how often it is updated."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    updates: int = 0

    @property
    def elements(self) -> int:
        """The number of elements of its state."""
        return math.prod(self.shape)


def streams_of(xs: Iterable[Any], writes: Iterable[Sequence[int]]) -> list[Stream]:
    """Return the streams of a chain.

    Args:
        xs: a tensor of each, or anything with its shape and dtype.
        writes: numbers of the streams that each step updates.
    """
    counts = Counter(chain.from_iterable(writes))
    return [Stream(tuple(x.shape), x.dtype, counts[i]) for i, x in enumerate(xs)]


def walks_back(arithmetic: type[State], gamma: Gamma, streams: Sequence[Stream]) -> bool:
    """True if a chain keeps states rather than its steps' inputs, at γ ≠ 0: what takes less over all its streams.

    Where each stream by itself decides alike, shapes do not matter. Where they differ, because one has another dtype or
    more updates, the bytes of all of them decide, elements times updates: so in such a chain alone, another size of one
    stream may be another arithmetic.

    Args:
        arithmetic: the chain's.
        gamma: γ.
        streams: the chain's.
    """
    moving = [stream for stream in streams if stream.updates]
    each = {arithmetic.walks_back(gamma, s.dtype, s.updates) for s in moving}
    if len(each) == 1:
        return each.pop()  # whatever their shapes
    states = sum(s.elements * arithmetic.bytes_counted(gamma, s.dtype, s.updates) for s in moving)
    return states < sum(s.elements * s.dtype.itemsize * s.updates for s in moving)


def choose_storage(
    arithmetic: type[State], gamma: Gamma, streams: Sequence[Stream], *, keeps_all: bool = False
) -> Storage:
    """Return what a chain keeps, as `walks_back` says.

    Arithmetic without anchors makes no error.

    Args:
        arithmetic: the chain's.
        gamma: γ.
        streams: the chain's.
        keeps_all: keep all activations.
    """
    moving = [stream for stream in streams if stream.updates]
    inputs = float(sum(s.elements * s.dtype.itemsize * s.updates for s in moving))
    if gamma.is_zero:
        return Storage("activations" if keeps_all else "inputs", math.inf, inputs, 0, 0.0)
    states = sum(_bytes_kept(arithmetic, gamma, s, s.updates) for s in moving)
    if keeps_all:
        return Storage("activations", states, inputs, 0, 0.0)
    if not walks_back(arithmetic, gamma, streams):
        return Storage("inputs", states, inputs, 0, 0.0)
    if all(arithmetic.anchor_every(gamma, s.dtype) is None for s in moving):
        return Storage("states", states, inputs, 0, 0.0)
    predictions = [predict(gamma, s.dtype, s.updates) for s in moving]
    return Storage("states", states, inputs, max(p.anchors for p in predictions), max(p.error for p in predictions))


def states_by_end(
    arithmetic: type[State], gamma: Gamma, streams: Sequence[Stream], writes: Sequence[Sequence[int]]
) -> tuple[float, ...] | None:
    """Return the bytes that a walk back from after step t needs, for t = 0, 1, …; None at γ = 0.

    Infinite where the chain keeps inputs.

    Args:
        arithmetic: the chain's.
        gamma: γ.
        streams: the chain's.
        writes: numbers of the streams that each step updates.
    """
    if gamma.is_zero:
        return None
    if choose_storage(arithmetic, gamma, streams).policy == "inputs":
        return (0.0, *[math.inf] * len(writes))
    counts, kept = [0] * len(streams), [0.0]
    for step in writes:
        for stream in step:
            counts[stream] += 1
        now = zip(streams, counts, strict=True)
        kept.append(sum(_bytes_kept(arithmetic, gamma, stream, count) for stream, count in now if count))
    return tuple(kept)


def _bytes_kept(arithmetic: type[State], gamma: Gamma, stream: Stream, updates: int) -> float:
    return stream.elements * arithmetic.bytes_kept(gamma, stream.dtype, updates)
