"""Runners: run the branches of one call as they are, keeping their inputs, or keeping a tape only.

Under a memory budget the second and third kind run some of the steps as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mfx.compat import is_capturing
from mfx.engine.arithmetic.signed import UpdateGamma
from mfx.engine.flags import verify_chain, verify_step, warn_once
from mfx.engine.memory.measure import StepMeasure, StorageKeys
from mfx.engine.recompute.checked_frame import CheckedFrame
from mfx.engine.recompute.environment import StepEnvironment
from mfx.engine.recompute.frame import Frame, KeptStep
from mfx.engine.recompute.random_clock import RandomClock
from mfx.engine.recompute.rebuilt import Handle, Rebuilt
from mfx.engine.recompute.saved import Captures, tensors_in
from mfx.engine.recompute.switches import Switches
from mfx.engine.recompute.tape import StoredInput, Tape
from mfx.engine.scope import inside_step, measured_by
from mfx.engine.steps import ChainCall, StepFunction, StepOutputs
from mfx.modules.random_state import global_generators
from mfx.text import listed
from mfx_passes.errors import MfxError


class Runner(Protocol):
    """Runs step ``index`` on the states that it reads, with the momenta ``gammas`` of the streams that it updates.

    At γ = 0, if ``original``, the step before rewriting.

    Attributes:
        values: the captures as the next step reads them, and the side outputs so far.
    """

    values: list[Any]

    def run(self, index: int, step: StepFunction, xs: Sequence[Tensor], gammas: Sequence[UpdateGamma]) -> StepOutputs:
        """Return the step's outputs; its side outputs become captures that later steps may read."""
        ...


class Ordinary(Runner):
    """Runs steps as they are: autograd keeps all activations."""

    def __init__(self, call: ChainCall, *, original: bool) -> None:
        self._root, self.values, self._original = call.root, list(call.captures), original

    def run(  # noqa: D102
        self, index: int, step: StepFunction, xs: Sequence[Tensor], gammas: Sequence[UpdateGamma]
    ) -> StepOutputs:
        function = step.original if self._original else step.branch
        ys, sides = step.split(function(self._root, *xs, *map(self.values.__getitem__, step.captures)))
        self.values.extend(sides)
        return ys, sides


class _Recomputing:
    """Makes the frames of one call.

    Args:
        call: the call.
        device: of the stream.
        original: run the steps as they were before they were rewritten.

    Raises:
        MfxError: the device would have to be waited for while a graph is captured.
    """

    def __init__(self, call: ChainCall, device: torch.device, *, original: bool) -> None:
        self._call, self._original = call, original
        if call.verifies and call.settings.verify == "raise" and is_capturing(device):
            raise MfxError(
                f"chain {call.name}: verify='raise' waits for the device, which cannot be while a graph is captured. "
                "Use verify='warn'"
            )
        self.values = list(call.captures)
        self._keys = StorageKeys()  # while costs are measured
        self._read: set[int] = set()
        self._captures = Captures(call.captures, f"{call.name}: a tensor that its steps read beside the stream")
        self._clock = RandomClock(global_generators(device), are_global=True)
        self._switches = Switches(device)

    def _run_kept(self, index: int, step: StepFunction, xs: Sequence[Tensor]) -> StepOutputs | None:
        """Run a step that keeps its activations, or those outside of the chains in it; None: it is another one."""
        keeps = index in self._call.plan.kept
        if not keeps and index not in self._call.plan.held:
            return None
        function = step.original if self._original else step.branch
        with inside_step(keeps=keeps or None):
            outputs = function(self._call.root, *xs, *map(self.values.__getitem__, step.captures))
        self._clock.tick()
        return self._hand_on(step, outputs)

    def _run_frame(
        self, frame: Frame, step: StepFunction, xs: Sequence[Tensor], unpack: Callable[[Handle], Tensor]
    ) -> StepOutputs:
        """Run a step that will be recomputed."""
        costs = self._call.costs
        if costs is None:
            return self._hand_on(step, frame.run(xs, self.values, unpack))
        read = tensors_in(tuple(self.values[i] for i in step.captures))
        measure = StepMeasure(self._keys, [*frame.tensors, *read])
        with measured_by(measure):
            outputs = frame.run(xs, self.values, unpack)
        # A state that several steps read is kept once.
        fresh = [x for x in xs if not self._read.issuperset(self._keys.sizes([x]))]
        self._read.update(self._keys.sizes(fresh))
        costs.append(measure.cost(xs, step.split(outputs)[0], fresh, shared=self._original))
        return self._hand_on(step, outputs)

    def _hand_on(self, step: StepFunction, outputs: tuple[Any, ...]) -> StepOutputs:
        ys, sides = step.split(outputs)
        if sides:
            self.values.extend(sides)
            self._captures.extend(sides)
        return ys, sides

    def _frame(self, index: int, step: StepFunction) -> Frame:
        key = ("buffers", index, self._original)
        call, clock, switches = self._call, self._clock, self._switches
        lock = call.settings.lock
        env = StepEnvironment(call.root, step.targets, step.path, key, call.cache, clock, switches, lock)
        if env.hooked:
            message = (
                f"chain {call.name}, step {step.path}: the backward pass runs steps a second time, and with this one "
                f"forward hooks on {listed(sorted(env.hooked))}, which have backward hooks, too: if the two "
                "keep account of each other (gradients per sample, for example), what they count is wrong. Use "
                "memory_budget=1.0, which runs no step twice, or pass over the second time by mfx.recomputing()"
            )
            warn_once("hooks", message, lock)
        function = step.original if self._original else step.branch
        if index in call.plan.whole:
            function = partial(_keeping, function)
        captures, writes = step.captures, len(step.writes)
        return self._make_frame(step, call.name, step.path, function, call.root, captures, writes, self._captures, env)

    def _make_frame(self, step: StepFunction, *args: Any) -> Frame:
        return Frame(*args)


class FromInputs(_Recomputing, Runner):
    """Keeps the input of every recomputed step: an ordinary checkpoint."""

    def __init__(self, call: ChainCall, device: torch.device, *, original: bool) -> None:
        super().__init__(call, device, original=original)
        self._rebuilt = Rebuilt(device)
        self._verifies = call.verifies

    def run(  # noqa: D102
        self, index: int, step: StepFunction, xs: Sequence[Tensor], gammas: Sequence[UpdateGamma]
    ) -> StepOutputs:
        if (outputs := self._run_kept(index, step, xs)) is not None:
            return outputs
        frame = self._frame(index, step)
        what = f"{self._call.name}: the input of step {step.path}"
        source = StoredInput(frame, xs, self._rebuilt, what, self._call.offload)
        return self._run_frame(frame, step, xs, source.unpacker())

    def _make_frame(self, step: StepFunction, *args: Any) -> Frame:
        if not self._verifies:
            return Frame(*args)
        call = self._call
        verify = partial(verify_step, call.name, call.cache, call.settings.verify, step.path)
        return CheckedFrame(*args, verify=verify)


class FromTape(_Recomputing, Runner):
    """Keeps nothing per recomputed step, beside its random states and the buffers it changes.

    Attributes:
        walked: numbers of the steps that the walk back passes.
    """

    def __init__(self, call: ChainCall, device: torch.device) -> None:
        super().__init__(call, device, original=False)
        verify = partial(verify_chain, call.name, call.cache, call.settings.verify) if call.verifies else None
        self.tape = Tape(call.name, device, verify, partial(warn_once, "walks", lock=call.settings.lock), call.offload)
        self.walked = call.plan.walked(len(call.steps))

    def run(  # noqa: D102
        self, index: int, step: StepFunction, xs: Sequence[Tensor], gammas: Sequence[UpdateGamma]
    ) -> StepOutputs:
        if (outputs := self._run_kept(index, step, xs)) is not None:
            if index in self.walked:
                self.tape.add(KeptStep(outputs[0], f"{self._call.name}: the value of step {step.path}"), step, gammas)
            return outputs
        frame = self._frame(index, step)
        return self._run_frame(frame, step, xs, self.tape.add(frame, step, gammas))


def _keeping(function: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[Any, ...]:
    with inside_step(keeps=True):
        return function(*args)
