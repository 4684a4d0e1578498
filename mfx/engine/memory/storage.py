"""Decides what a chain keeps between forward and backward, by its cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        states: bytes per element of the stream that states take (with the store of digits, or with anchors); infinite
            where walking back is impossible.
        inputs: bytes per element that the steps' inputs take.
        anchors: stored states beside the end state.
        error: predicted relative error in a rebuilt state.
    """

    policy: str
    states: float
    inputs: float
    anchors: int
    error: float


def choose_storage(
    arithmetic: type[State], gamma: Gamma, dtype: torch.dtype, steps: int, *, keeps_all: bool = False
) -> Storage:
    """Return what a chain of so many steps keeps, as its arithmetic says (``walks_back``).

    Arithmetic without anchors makes no error.

    Args:
        arithmetic: the chain's.
        gamma: γ.
        dtype: of the stream.
        steps: T.
        keeps_all: keep all activations.
    """
    inputs = float(dtype.itemsize * steps)
    if gamma.is_zero:
        return Storage("activations" if keeps_all else "inputs", math.inf, inputs, 0, 0.0)
    states = arithmetic.bytes_kept(gamma, dtype, steps)
    if keeps_all:
        return Storage("activations", states, inputs, 0, 0.0)
    if not arithmetic.walks_back(gamma, dtype, steps):
        return Storage("inputs", states, inputs, 0, 0.0)
    every = arithmetic.anchor_every(gamma, dtype)
    if every is None:
        return Storage("states", states, inputs, 0, 0.0)
    return Storage("states", states, inputs, *predict(gamma, dtype, steps))


def states_by_end(
    arithmetic: type[State], gamma: Gamma, dtype: torch.dtype, elements: int, steps: int
) -> tuple[float, ...] | None:
    """Return the bytes that a walk back from after step t needs, for t = 0 … ``steps``; None at γ = 0.

    Infinite where the chain keeps inputs.
    """
    if gamma.is_zero:
        return None
    if not arithmetic.walks_back(gamma, dtype, steps):
        return (0.0, *[math.inf] * steps)
    return (0.0, *(elements * arithmetic.bytes_kept(gamma, dtype, end) for end in range(1, steps + 1)))
