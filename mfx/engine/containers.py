"""Modules around runs of steps that FSDP2 shards: gathered once for the whole run, though nothing calls them.

Between a container's first and last step FSDP2's own hooks run as around a call of it: one all-gather in the forward
pass; one in the backward pass, before the first gradient comes to one of the steps; one reduce-scatter, when the
gradients of all that the run was given are there. A recomputation in between finds the parameters whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from mfx import compat
from mfx.engine.arithmetic.signed import UpdateGamma
from mfx.engine.recompute.runners import Runner
from mfx.engine.recompute.saved import tensors_in
from mfx.engine.steps import ChainCall, StepFunction, StepOutputs


@dataclass
class _Run:
    """A container while its steps run in the forward pass.

    Attributes:
        module: the container.
        before: the values of the captures that it was handed otherwise, by their numbers.
        outputs: all that its steps have given.
    """

    module: nn.Module
    before: dict[int, Any]
    outputs: list[Any] = field(default_factory=list)


class Gathering(Runner):
    """Runs the steps of a call, and enters and leaves its sharded containers on the way.

    Args:
        runner: runs the steps.
        call: the call.
        original: True if the steps run as they were before they were rewritten: then FSDP2's casts are the function's.
    """

    def __init__(self, runner: Runner, call: ChainCall, *, original: bool) -> None:
        self._runner, self._call, self._original = runner, call, original
        self.values = runner.values
        self._open: list[_Run] = []

    def run(  # noqa: D102
        self, index: int, step: StepFunction, xs: Sequence[Tensor], gammas: Sequence[UpdateGamma]
    ) -> StepOutputs:
        around = [(c, attrgetter(c.path)(self._call.root)) for c in self._call.containers if c.first <= index < c.stop]
        around = [(container, module) for container, module in around if compat.shards_of(module) is not None]
        for container, module in around:
            if container.first == index:
                xs = self._enter(module, xs, container.first, container.stop)
        outputs = self._runner.run(index, _inside(step, [module for _, module in around]), xs, gammas)
        for run in self._open:
            run.outputs.append(outputs)
        for container, _ in reversed(around):
            if container.stop == index + 1:
                outputs = self._leave(outputs)
        return outputs

    def _enter(self, module: nn.Module, xs: Sequence[Tensor], first: int, stop: int) -> Sequence[Tensor]:
        """Return the states as the container hands them to its first step; its captures are handed on likewise."""
        read = sorted({i for step in self._call.steps[first:stop] for i in step.captures if i < len(self.values)})
        handed, captures = compat.enter_sharded(module, (tuple(xs), tuple(self.values[i] for i in read)))
        self._open.append(_Run(module, {i: self.values[i] for i in read}))
        for i, value in zip(read, captures, strict=True):
            self.values[i] = value
        return handed

    def _leave(self, outputs: StepOutputs) -> StepOutputs:
        run = self._open.pop()
        for i, value in run.before.items():
            self.values[i] = value
        compat.leave_sharded(run.module, tensors_in(tuple(run.outputs)))
        return compat.cast_output(run.module, outputs) if self._original else outputs


def gathering(runner: Runner, call: ChainCall, *, original: bool) -> Runner:
    """Return a runner of a call that takes care of its containers, if one of them is sharded."""
    if not compat.may_be_sharded() or all(
        compat.shards_of(attrgetter(container.path)(call.root)) is None for container in call.containers
    ):
        return runner
    return Gathering(runner, call, original=original)


def _inside(step: StepFunction, modules: Sequence[nn.Module]) -> StepFunction:
    """Return a step that computes as inside its containers, in its recomputation, too."""
    if not modules:
        return step
    branch, original = (partial(_run_inside, function, modules) for function in (step.branch, step.original))
    return replace(step, branch=branch, original=original)


def _run_inside(
    function: Callable[..., tuple[Any, ...]], modules: Sequence[nn.Module], root: Any, *args: Any
) -> tuple[Any, ...]:
    with ExitStack() as stack:
        for module in modules:
            # A walk back may pass where no gradient has come, or comes no more.
            stack.enter_context(compat.gathered(module))
            args = compat.cast_inputs(module, args)
        return function(root, *args)
