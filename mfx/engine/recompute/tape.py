"""The tape of a chain: walks its states back, step by step, as the backward pass needs saved tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mfx.compat import NO_TASK, current_task, keeps_graph, when_task_ends
from mfx.engine.arithmetic import State
from mfx.engine.arithmetic.base import Frozen
from mfx.engine.arithmetic.signed import UpdateGamma
from mfx.engine.offload import Offload
from mfx.engine.recompute.frame import Frame, KeptStep
from mfx.engine.recompute.rebuilt import Handle, Rebuilt
from mfx.engine.recompute.saved import SavedTensors, freed
from mfx.engine.steps import StepFunction

_MANY = 4  # walks of one graph: more than second derivatives take


class StoredInput:
    """The kept states that one step reads, as in an ordinary checkpoint."""

    def __init__(
        self, frame: Frame, xs: Sequence[Tensor], rebuilt: Rebuilt, what: str, offload: Offload | None
    ) -> None:
        self._frame, self._rebuilt = frame, rebuilt
        self._xs = SavedTensors(xs, what, offload)

    def unpacker(self) -> Callable[[Handle], Tensor]:
        """Return the function that turns a handle into its tensor."""
        return partial(self._rebuilt.provide, self._rebuild)

    def _rebuild(self) -> None:
        self._rebuilt.clear()
        self._frame.rerun(self._xs.get(), self._rebuilt, to_value=False)


class _Unmoved:
    """Stands for the state of a stream that no step has updated yet: all that is needed is its tensor."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def stream(self) -> Tensor:
        return self._x


class _Stored:
    """The states of all streams at one time, which a walk can start from.

    Args:
        states: for each stream, its state, or its tensor if it was not updated yet.
        what: says what that is.
        offload: where it lies.
    """

    def __init__(self, states: Sequence[State | Tensor], what: str, offload: Offload | None) -> None:
        frozen = [Frozen((s,), _thaw_unmoved) if isinstance(s, Tensor) else s.freeze() for s in states]
        self._thaw = [(len(tensors), thaw) for tensors, thaw in frozen]
        self._tensors = SavedTensors([tensor for tensors, _ in frozen for tensor in tensors], what, offload)

    def states(self) -> list[State | _Unmoved]:
        """Return the states; they do not write into what is stored."""
        tensors = iter(self._tensors.get())
        return [thaw(tuple(islice(tensors, count))) for count, thaw in self._thaw]


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _thaw_unmoved(tensors: tuple[Tensor, ...]) -> Any:
    return _Unmoved(*tensors)


@dataclass
class _Walk:
    """The progress of one backward pass: ``states`` are those after ``position`` steps; none: the stored ones.

    Attributes:
        xs: the tensors of the streams then, as far as they are known.
    """

    task: int
    position: int
    states: list[Any] = field(default_factory=list)
    xs: dict[int, Tensor] = field(default_factory=dict)
    ends_with_task: bool = False

    def start(self, states: list[State | _Unmoved]) -> None:
        """Go on from other states."""
        self.states, self.xs = states, {}


class Tape:
    """Consecutive steps of one call, of which the first and the last are recomputed, and the states to walk back from.

    Positions count the steps from the tape's first one. A walk starts from the nearest stored states; where it comes by
    others, it continues from those. The end states, stored like the others, are dropped when a backward pass that frees
    the graph has begun at the end of every stream, and else live as long as a handle does: parts of a graph may be run
    backward by themselves, also after its outputs are gone (pipelines compute the gradients of weights so). After a
    complete walk ``verify`` is called with the result of comparing its last states with those that the first step
    started from. ``warn`` is called with a message when there are many walks.
    """

    def __init__(
        self,
        chain: str,
        device: torch.device,
        verify: Callable[[Tensor], None] | None,
        warn: Callable[[str], None],
        offload: Offload | None,
    ) -> None:
        self._chain = chain
        self._steps: list[tuple[Frame | KeptStep, StepFunction, Sequence[UpdateGamma]]] = []
        self._open: set[int] = set()  # the streams at whose ends no backward pass has begun that frees the graph
        self._stored: dict[int, _Stored] = {}
        self._walk: _Walk | None = None
        self._rebuilt = Rebuilt(device)
        self._verify, self._warn, self._offload = verify, warn, offload
        self._walks = 0

    def add(
        self, frame: Frame | KeptStep, step: StepFunction, gammas: Sequence[UpdateGamma]
    ) -> Callable[[Handle], Tensor]:
        """Append a step; return the function that turns its handles, if it is recomputed, into tensors."""
        self._steps.append((frame, step, gammas))
        self._open.update(step.writes)
        return partial(self._rebuilt.provide, partial(self._rebuild, len(self._steps) - 1, frame))

    def interrupt(self, position: int, states: Sequence[State | Tensor], what: str) -> None:
        """End in front of a step that an exception has ended, in these states: what ran before may be differentiated.

        They are kept by no hooks of others, who may have raised the exception.
        """
        del self._steps[position:]
        if position:
            with saved_tensors_hooks(_as_is, _as_is):
                self.store(position, states, what)

    def store(self, position: int, states: Sequence[State | Tensor], what: str) -> None:
        """Let walks start or continue from ``states`` at ``position``; the last ones are the end.

        All of it is kept: the error of a walk is not known beforehand. Where a branch rounds to bfloat16, by itself or
        under autocast, its values for nearly the same x differ in the third digit.
        """
        self._stored[position] = _Stored(states, what, self._offload)

    def begin(self, stream: int) -> None:
        """Start a walk from the end: a backward pass has reached that of a stream, before any handle."""
        end = len(self._steps)
        if end not in self._stored:
            return  # an earlier pass has freed the graph, as autograd itself will say
        walk = self._walk
        if walk is None or walk.task != current_task():
            self._set_walk(walk := self._new_walk(current_task(), end))
        if keeps_graph() or torch.is_grad_enabled():  # a pass that is differentiated itself leaves handles, too
            return
        self._open.discard(stream)
        if not self._open:
            stored = self._stored.pop(end)
            if walk.position == end:
                walk.start(stored.states())

    def _rebuild(self, index: int, frame: Frame | KeptStep) -> None:
        if frame.live is not None:
            frame.rerun(frame.live, self._rebuilt, to_value=False)
            return
        walk = self._walk_above(index)
        self._walk = None  # if a step fails, the next walk starts anew
        while walk.position > index:
            self._step_down(walk)
        if walk.ends_with_task:
            self._walk = walk
        elif walk.task != NO_TASK:
            self._set_walk(walk)

    def _set_walk(self, walk: _Walk) -> None:
        self._walk, walk.ends_with_task = walk, True
        when_task_ends(partial(_end_walk, weakref.ref(self), walk.task))

    def _walk_above(self, index: int) -> _Walk:
        """Return the walk of this backward pass if it is above step ``index``, else one from the end."""
        task, walk = current_task(), self._walk
        if walk is not None and walk.task == task and walk.position > index:
            return walk
        position = min((stored for stored in self._stored if stored > index), default=None)
        if position is None:
            raise freed(f"{self._chain}: the state that activations are rebuilt from")
        return self._new_walk(task, position)

    def _new_walk(self, task: int, position: int) -> _Walk:
        self._walks += task != NO_TASK
        if self._walks == _MANY + 1:
            self._warn(
                f"chain {self._chain}: the backward pass of one graph has rebuilt the activations more than {_MANY} "
                "times, and each time runs branches again. That is so if gradients are asked for one by one "
                "(retain_graph=True in a loop, zero-bubble pipelines); memory_budget=1.0 runs nothing again"
            )
        return _Walk(task, position)

    def _step_down(self, walk: _Walk) -> None:
        repeatable = len(self._steps) in self._stored
        if repeatable:
            # The graph is retained, so handles stay alive; what they still hold can be rebuilt.
            self._rebuilt.clear()
        if (stored := self._stored.get(walk.position)) is not None:  # the step above has its gradients now
            walk.start(stored.states())
            if not repeatable:
                del self._stored[walk.position]
        assert walk.states, "a walk starts from stored states"
        walk.position -= 1
        frame, step, gammas = self._steps[walk.position]
        states, xs, is_first = walk.states, walk.xs, walk.position == 0
        for stream in step.writes:
            xs[stream] = states[stream].retreat_x()
        for stream in step.reads:
            if stream not in xs:
                xs[stream] = states[stream].stream()
        ys = frame.rerun(
            [xs[stream] for stream in step.reads], self._rebuilt, to_value=not is_first or self._verify is not None
        )
        if isinstance(frame, KeptStep) and not repeatable:
            frame.release()
        if is_first:
            walk.start([])
        if ys is None:  # the velocities before the first step are not needed
            return
        for y, stream, kind, gamma in zip(ys, step.writes, step.kinds, gammas, strict=True):
            states[stream].retreat_v(y, kind, gamma)
        if is_first and self._verify is not None:
            moved = {stream for _, step, _ in self._steps for stream in step.writes}
            self._verify(reduce(torch.logical_and, (states[stream].is_start() for stream in sorted(moved))))


def _end_walk(this: weakref.ref[Tape], task: int) -> None:
    tape = this()
    if tape is not None and tape._walk is not None and tape._walk.task == task:
        tape._walk = None
