"""The streams of one call of a chain, moved on from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mfx.engine.steps import ChainOutput, Mark, Phase, StepFunction, mark_gradients


class Streams:
    """The streams of a call as they move on, and its output as it comes in.

    Args:
        xs: their tensors.
        taps: see `run_chain`.
        mark: see `ChainCall`.
    """

    def __init__(self, xs: Sequence[Tensor], taps: Sequence[tuple[int, int]], mark: Mark | None = None) -> None:
        self.xs = list(xs)
        self._mark = mark
        self._wanted = set(taps)
        self._tap_order = taps
        self._taps: dict[tuple[int, int], Tensor] = {}
        self._sides: list[tuple[Any, ...]] = []
        self.has_sides = False

    def read(self, step: StepFunction) -> list[Tensor]:
        """Return the states that a step reads, which is run next."""
        if self._mark is not None:
            self._mark(len(self._sides), Phase.RUN)
        return [*map(self.xs.__getitem__, step.reads)]

    def branch_is_done(self) -> None:
        """Note that the branch of the next step has run."""
        if self._mark is not None:
            self._mark(len(self._sides), Phase.DONE)

    def add(self, step: StepFunction, xs: Sequence[Tensor], side: Sequence[Any]) -> None:
        """Take in the new states, and the side outputs, of a step."""
        if self._mark is not None:
            mark_gradients(self._mark, len(self._sides), xs)
        self._sides.append(tuple(side))
        if side:
            self.has_sides = True
        for stream, x in zip(step.writes, xs, strict=True):
            self.xs[stream] = x
            if self._wanted and (tap := (len(self._sides), stream)) in self._wanted:
                self._taps[tap] = x

    def finish(self) -> ChainOutput:
        """Return the output."""
        return ChainOutput(tuple(self.xs), tuple(self._taps[tap] for tap in self._tap_order), tuple(self._sides))
