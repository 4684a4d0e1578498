"""How the branches of one call are run: as they are, keeping their inputs, or keeping nothing but a tape.

Under a memory budget the second and third way run some of the steps as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mfx.engine.memory.measure import StepMeasure
from mfx.engine.memory.plan import StepCost
from mfx.engine.recompute.checked_frame import CheckedFrame
from mfx.engine.recompute.environment import Autocast, RandomClock, StepEnvironment
from mfx.engine.recompute.frame import Frame, Handle, KeptStep, Rebuilt
from mfx.engine.recompute.saved import Captures, tensors_in
from mfx.engine.recompute.tape import StoredInput, Tape
from mfx.engine.scope import inside_kept_step, measured_by
from mfx.engine.steps import ChainCache, StepFunction
from mfx.options.gamma import Gamma


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
    """Makes the frames of one call.

    Args:
        name: of the chain.
        root: see `run_chain`.
        captures: see `run_chain`.
        device: of the stream.
        memory: see `run_chain`.
        kept: numbers of the steps that keep their activations.
        costs: takes in what the steps cost, if that is to be found out.
        original: whether the steps run as they were before they were rewritten.
    """

    def __init__(
        self,
        name: str,
        root: Any,
        captures: Sequence[Any],
        device: torch.device,
        memory: ChainCache,
        *,
        kept: Collection[int],
        costs: list[StepCost] | None,
        original: bool,
    ) -> None:
        self._name, self._root, self._memory, self._original = name, root, memory, original
        self._kept, self._costs = kept, costs
        self._values = list(captures)
        self._captures = Captures(captures, f"{name}: a tensor that its steps read beside the stream")
        self._clock, self._autocast = RandomClock(device), Autocast(device)

    def _run_kept(self, step: StepFunction, x: Tensor) -> tuple[Any, ...]:
        """Run a step whose activations autograd keeps."""
        with inside_kept_step():
            outputs = self._call_of(step)(self._root, x, *(self._values[i] for i in step.captures))
        self._clock.tick()
        return self._hand_on(outputs)

    def _run_frame(
        self, frame: Frame, step: StepFunction, x: Tensor, unpack: Callable[[Handle], Tensor]
    ) -> tuple[Any, ...]:
        """Run a step that will run again."""
        if self._costs is None:
            return self._hand_on(frame.run(x, self._values, unpack))
        read = tensors_in(tuple(self._values[i] for i in step.captures))
        measure = StepMeasure([*frame.tensors, *read])
        with measured_by(measure):
            outputs = frame.run(x, self._values, unpack)
        self._costs.append(measure.cost(x, outputs[0], shared=self._original))
        return self._hand_on(outputs)

    def _hand_on(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        sides = outputs[1:]
        self._values.extend(sides)
        self._captures.extend(sides)
        return outputs

    def _call_of(self, step: StepFunction) -> Callable[..., tuple[Any, ...]]:
        return step.original if self._original else step.branch

    def _frame(self, index: int, step: StepFunction) -> Frame:
        key = ("buffers", index, self._original)
        world = StepEnvironment(self._root, step.targets, step.path, key, self._memory, self._clock, self._autocast)
        call = self._call_of(step)
        return self._make_frame(step, self._name, step.path, call, self._root, step.captures, self._captures, world)

    def _make_frame(self, step: StepFunction, *args: Any) -> Frame:
        return Frame(*args)


class FromInputs(_Recomputing, Runner):
    """Keeps the input of every step that runs again: an ordinary checkpoint.

    ``verify`` is told after every second run, with the step's path, whether it was as the first.
    """

    def __init__(self, *args: Any, verify: Callable[[str, Tensor], None] | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rebuilt = Rebuilt()
        self._verify = verify

    def run(self, index: int, step: StepFunction, x: Tensor, gamma: Gamma) -> tuple[Any, ...]:  # noqa: D102
        if index in self._kept:
            return self._run_kept(step, x)
        frame = self._frame(index, step)
        source = StoredInput(frame, x, self._rebuilt, f"{self._name}: the input of step {step.path}")
        return self._run_frame(frame, step, x, source.unpacker())

    def _make_frame(self, step: StepFunction, *args: Any) -> Frame:
        if self._verify is None:
            return Frame(*args)
        return CheckedFrame(*args, verify=partial(self._verify, step.path))


class FromTape(_Recomputing, Runner):
    """Keeps nothing per step that runs again but what the second run cannot do without.

    ``walked``: the steps that the walk back passes.
    """

    def __init__(self, *args: Any, walked: range, verify: Callable[[Tensor], None] | None, **options: Any) -> None:
        super().__init__(*args, original=False, **options)
        self.tape = Tape(verify)
        self.walked = walked

    def run(self, index: int, step: StepFunction, x: Tensor, gamma: Gamma) -> tuple[Any, ...]:  # noqa: D102
        if index in self._kept:
            outputs = self._run_kept(step, x)
            if index in self.walked:
                what = f"{self._name}: the value of step {step.path}"
                self.tape.pass_by(KeptStep(outputs[0], what), step.kind, gamma)
            return outputs
        frame = self._frame(index, step)
        return self._run_frame(frame, step, x, self.tape.add(frame, step.kind, gamma))
