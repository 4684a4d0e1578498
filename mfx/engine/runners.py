"""How the branches of one call are run: as they are, keeping their inputs, or keeping nothing but a tape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mfx.engine.checked import CheckedFrame
from mfx.engine.frame import Frame, Rebuilt
from mfx.engine.keep import Captures
from mfx.engine.steps import StepFunction
from mfx.engine.surroundings import Autocast, Memory, RandomClock, Surroundings
from mfx.engine.tape import StoredInput, Tape
from mfx.gamma import Gamma

__all__ = ["FromInputs", "FromTape", "Ordinary", "Runner"]


class Runner(Protocol):
    """Runs step ``index`` on ``x``, with momentum ``gamma``; at γ = 0 the original step, as ``original`` says."""

    def run(self, index: int, step: StepFunction, x: Tensor, gamma: Gamma) -> tuple[Any, ...]:
        """What the step returned; its side outputs become captures that later steps may read."""
        ...


class Ordinary(Runner):
    """Autograd keeps what it keeps."""

    def __init__(self, root: Any, captures: Sequence[Any], *, original: bool) -> None:
        self._root, self._captures, self._original = root, list(captures), original

    def run(self, index: int, step: StepFunction, x: Tensor, gamma: Gamma) -> tuple[Any, ...]:  # noqa: D102
        call = step.original if self._original else step.branch
        outputs = call(self._root, x, *(self._captures[i] for i in step.captures))
        self._captures.extend(outputs[1:])
        return outputs


class _Recomputing:
    """Makes the frames of one call."""

    def __init__(
        self, name: str, root: Any, captures: Sequence[Any], device: torch.device, memory: Memory, *, original: bool
    ) -> None:
        self._name, self._root, self._memory, self._original = name, root, memory, original
        self._values = list(captures)
        self._captures = Captures(captures, f"{name}: a tensor that its steps read beside the stream")
        self._clock, self._autocast = RandomClock(device), Autocast(device)

    def _hand_on(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        sides = outputs[1:]
        self._values.extend(sides)
        self._captures.extend(sides)
        return outputs

    def _frame(self, index: int, step: StepFunction) -> Frame:
        key = ("buffers", index, self._original)
        world = Surroundings(self._root, step.targets, step.path, key, self._memory, self._clock, self._autocast)
        call = step.original if self._original else step.branch
        return self._make_frame(step, self._name, step.path, call, self._root, step.captures, self._captures, world)

    def _make_frame(self, step: StepFunction, *args: Any) -> Frame:
        return Frame(*args)


class FromInputs(_Recomputing, Runner):
    """Keeps every step's input: an ordinary checkpoint.

    ``verify`` is told after every second run, with the step's path, whether it was as the first.
    """

    def __init__(self, *args: Any, original: bool, verify: Callable[[str, Tensor], None] | None) -> None:
        super().__init__(*args, original=original)
        self._rebuilt = Rebuilt()
        self._verify = verify

    def run(self, index: int, step: StepFunction, x: Tensor, gamma: Gamma) -> tuple[Any, ...]:  # noqa: D102
        frame = self._frame(index, step)
        source = StoredInput(frame, x, self._rebuilt, f"{self._name}: the input of step {step.path}")
        return self._hand_on(frame.run(x, self._values, source.unpack))

    def _make_frame(self, step: StepFunction, *args: Any) -> Frame:
        if self._verify is None:
            return Frame(*args)
        return CheckedFrame(*args, verify=partial(self._verify, step.path))


class FromTape(_Recomputing, Runner):
    """Keeps nothing per step but what the second run cannot do without."""

    def __init__(self, *args: Any, verify: Callable[[Tensor], None] | None) -> None:
        super().__init__(*args, original=False)
        self.tape = Tape(verify)

    def run(self, index: int, step: StepFunction, x: Tensor, gamma: Gamma) -> tuple[Any, ...]:  # noqa: D102
        frame = self._frame(index, step)
        return self._hand_on(frame.run(x, self._values, self.tape.add(frame, step.kind, gamma)))
