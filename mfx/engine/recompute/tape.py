"""The tape of a chain: walks its states back, step by step, as the backward pass needs saved tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mfx.compat import NO_TASK, current_task, keeps_graph, when_task_ends
from mfx.engine.arithmetic import State
from mfx.engine.recompute.frame import Frame, Handle, KeptStep, Rebuilt
from mfx.engine.recompute.saved import SavedTensors, freed
from mfx.options.gamma import Gamma

_MANY = 4  # walks of one graph: more than second derivatives take


class StoredInput:
    """The kept input of one step, as in an ordinary checkpoint."""

    def __init__(self, frame: Frame, x: Tensor, rebuilt: Rebuilt, what: str) -> None:
        self._frame, self._rebuilt = frame, rebuilt
        self._x = SavedTensors([x], what)

    def unpacker(self) -> Callable[[Handle], Tensor]:
        """Return the function that turns a handle into its tensor."""
        return partial(self._rebuilt.provide, self._rebuild)

    def _rebuild(self) -> None:
        self._rebuilt.clear()
        self._frame.rerun(self._x.get()[0], self._rebuilt, to_value=False)


@dataclass
class _Walk:
    """The progress of one backward pass: ``state`` is the chain's after ``position`` steps; None: the stored one."""

    task: int
    position: int
    state: State | None = None
    ends_with_task: bool = False


class _Stored:
    """A state that a walk can start from."""

    def __init__(self, state: State, what: str) -> None:
        tensors, self._thaw = state.freeze()
        self._tensors = SavedTensors(tensors, what)

    def state(self) -> State:
        """Return the state; it does not write into what is stored."""
        return self._thaw(self._tensors.get())


class Tape:
    """Consecutive steps of one call, of which the first and the last are recomputed, and the state to walk back from.

    Positions count the steps from the tape's first one. A walk starts from the nearest stored state; where it comes by
    another one, it continues from that. The end state, stored like the others, is dropped when a backward pass that
    frees the graph has begun there, and else lives as long as a handle does: parts of a graph may be run backward by
    themselves, also after its outputs are gone (pipelines compute the gradients of weights so). After a complete walk
    ``verify`` is called with the result of comparing its last state with the one that the first step started from.
    ``warn`` is called with a message when there are many walks.
    """

    def __init__(
        self,
        chain: str,
        device: torch.device,
        verify: Callable[[Tensor], None] | None,
        warn: Callable[[str], None],
    ) -> None:
        self._chain = chain
        self._steps: list[tuple[Frame | KeptStep, str, Gamma]] = []
        self._stored: dict[int, _Stored] = {}
        self._walk: _Walk | None = None
        self._rebuilt = Rebuilt(device)
        self._verify, self._warn = verify, warn
        self._walks = 0

    def add(self, frame: Frame, kind: str, gamma: Gamma) -> Callable[[Handle], Tensor]:
        """Append a step; return the function that turns its handles into tensors."""
        self._steps.append((frame, kind, gamma))
        return partial(self._rebuilt.provide, partial(self._rebuild, len(self._steps) - 1))

    def pass_by(self, step: KeptStep, kind: str, gamma: Gamma) -> None:
        """Append a step that is not recomputed."""
        self._steps.append((step, kind, gamma))

    def store(self, position: int, state: State, what: str) -> None:
        """Let walks start or continue from ``state`` at ``position``; the last one is the end.

        All of it is kept: the error of a walk is not known beforehand. Where a branch rounds to bfloat16, by itself or
        under autocast, its values for nearly the same x differ in the third digit.
        """
        self._stored[position] = _Stored(state, what)

    def begin(self) -> None:
        """Start a walk from the end: a backward pass has reached it, before any handle."""
        end = len(self._steps)
        if end not in self._stored:
            return  # an earlier pass has freed the graph, as autograd itself will say
        walk = self._new_walk(current_task(), end)
        if not (keeps_graph() or torch.is_grad_enabled()):  # a pass that is differentiated itself leaves handles, too
            walk.state = self._stored.pop(end).state()
        self._set_walk(walk)

    def _rebuild(self, index: int) -> None:
        frame = self._steps[index][0]
        if frame.live is not None:
            frame.rerun(frame.live, self._rebuilt, to_value=False)
            return
        walk = self._walk_above(index)
        self._walk = None  # if a step fails, the next walk starts anew
        while walk.position > index:
            self._step_down(walk)
        if walk.task != NO_TASK:
            self._set_walk(walk)

    def _set_walk(self, walk: _Walk) -> None:
        self._walk = walk
        if not walk.ends_with_task:
            walk.ends_with_task = True
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
            walk.state = stored.state()
            if not repeatable:
                del self._stored[walk.position]
        state = walk.state
        assert state is not None, "a walk starts from a stored state"
        walk.position -= 1
        frame, kind, gamma = self._steps[walk.position]
        is_first = walk.position == 0
        y = frame.rerun(state.retreat_x(), self._rebuilt, to_value=not is_first or self._verify is not None)
        if isinstance(frame, KeptStep) and not repeatable:
            frame.release()
        if is_first:
            walk.state = None
        if y is None:  # the velocity before the first step is not needed
            return
        state.retreat_v(y, kind, gamma)
        if is_first and self._verify is not None:
            self._verify(state.is_start())


def _end_walk(this: weakref.ref[Tape], task: int) -> None:
    tape = this()
    if tape is not None and tape._walk is not None and tape._walk.task == task:
        tape._walk = None
