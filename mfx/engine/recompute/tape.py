"""The tape of a chain: walks its states back, step by step, as the backward pass needs saved tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mfx.compat import NO_TASK, current_task, when_task_ends
from mfx.engine.arithmetic import State
from mfx.engine.recompute.frame import Frame, Handle, KeptStep, Rebuilt
from mfx.engine.recompute.saved import SavedTensors
from mfx.options.gamma import Gamma


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
    """The progress of one backward pass: ``state`` is the chain's after ``position`` steps."""

    task: int
    position: int
    state: State | None
    repeatable: bool | None = None  # another walk can start from the end; None: not looked up yet
    ends_with_task: bool = False


@dataclass(frozen=True)
class _Stored:
    """A state that a walk can start from."""

    tensors: Callable[[], tuple[Tensor, ...]]
    thaw: Callable[[tuple[Tensor, ...]], State]


def _stored(state: State, what: str) -> _Stored:
    tensors, thaw = state.freeze()
    return _Stored(SavedTensors(tensors, what).get, thaw)


class Tape:
    """Consecutive steps of one call, of which the first and the last are recomputed, and the state to walk back from.

    Positions count the steps from the tape's first one. The end state is kept by the autograd node of the tape's last
    update, which frees it as soon as the walk has begun; or here, by ``store_end``, if gradients may arrive without
    passing through that node. At an anchor a walk continues from the stored state. After a complete walk ``verify`` is
    called with the result of comparing its last state with the one that the first step started from.
    """

    def __init__(self, verify: Callable[[Tensor], None] | None) -> None:
        self.last: weakref.ref[Any] | None = None
        self._steps: list[tuple[Frame | KeptStep, str, Gamma]] = []
        self._end: _Stored | None = None
        self._anchors: dict[int, _Stored] = {}
        self._walk: _Walk | None = None
        self._rebuilt = Rebuilt()
        self._verify = verify

    def add(self, frame: Frame, kind: str, gamma: Gamma) -> Callable[[Handle], Tensor]:
        """Append a step; return the function that turns its handles into tensors."""
        self._steps.append((frame, kind, gamma))
        return partial(self._rebuilt.provide, partial(self._rebuild, len(self._steps) - 1))

    def pass_by(self, step: KeptStep, kind: str, gamma: Gamma) -> None:
        """Append a step that is not recomputed."""
        self._steps.append((step, kind, gamma))

    def store_end(self, state: State, what: str) -> None:
        """Keep the state after all steps."""
        self._end = _stored(state, what)

    def anchor(self, position: int, state: State, what: str) -> None:
        """Let walks continue from ``state`` at ``position``.

        All of it is kept: the error of a walk is not known beforehand. Where a branch rounds to bfloat16, by itself or
        under autocast, its values for nearly the same x differ in the third digit.
        """
        self._anchors[position] = _stored(state, what)

    def begin(self, state: State) -> None:
        """Start a walk from ``state``, the chain's end: a backward pass has reached it."""
        self._set_walk(_Walk(current_task(), len(self._steps), state))
        if torch.is_grad_enabled():
            # This backward pass will itself be differentiated. That one need not pass through the last update, which
            # may be freed by then.
            tensors, thaw = state.freeze()
            self._end = _Stored(lambda: tensors, thaw)

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
        if self._end is not None:
            return _Walk(task, len(self._steps), self._end.thaw(self._end.tensors()))
        ctx = self._last_update()
        assert ctx is not None, "the end state is gone while a handle is alive"
        return _Walk(task, len(self._steps), ctx.thaw(ctx.saved_tensors))

    def _step_down(self, walk: _Walk) -> None:
        if walk.repeatable is None:
            walk.repeatable = self._end is not None or self._last_update() is not None
        if walk.repeatable:
            # The graph is retained, so handles stay alive; what they still hold can be rebuilt.
            self._rebuilt.clear()
        if (anchor := self._anchors.get(walk.position)) is not None:  # the step above has its gradients now
            walk.state = anchor.thaw(anchor.tensors())
            if not walk.repeatable:
                del self._anchors[walk.position]
        state = walk.state
        assert state is not None
        walk.position -= 1
        frame, kind, gamma = self._steps[walk.position]
        is_first = walk.position == 0
        y = frame.rerun(state.retreat_x(), self._rebuilt, to_value=not is_first or self._verify is not None)
        if isinstance(frame, KeptStep) and not walk.repeatable:
            frame.release()
        if is_first:
            walk.state = None
        if y is None:  # the velocity before the first step is not needed
            return
        state.retreat_v(y, kind, gamma)
        if is_first and self._verify is not None:
            self._verify(state.is_start())

    def _last_update(self) -> Any:
        """Return the last update's node if it still has the end state: until its backward has run, unless retained."""
        ctx = self.last() if self.last is not None else None
        try:
            return ctx if ctx is not None and ctx.saved_tensors else None
        except RuntimeError:
            return None


def _end_walk(this: weakref.ref[Tape], task: int) -> None:
    tape = this()
    if tape is not None and tape._walk is not None and tape._walk.task == task:
        tape._walk = None
