"""One step of one call: run under hooks that keep nothing, and run again to provide what they were asked for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mfx.compat import NO_TASK, current_task, when_task_ends
from mfx.engine.recompute.environment import StepEnvironment
from mfx.engine.recompute.saved import Captures, SavedTensors
from mfx.engine.scope import measure
from mfx.modules.uninterrupted import may_be_ended
from mfx_passes.errors import MfxError

Branch = Callable[..., tuple[Any, ...]]
_Packed = tuple["weakref.ref[Handle]", torch.Size, torch.dtype]


class Handle:
    """Stands in the autograd graph for one tensor that a branch wanted saved.

    As autograd lets go of a node, it lets go of the node's handles, and the tensors provided for them go too.
    """

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.version = 0  # that of the tensor when it was saved


class Rebuilt:
    """Sees that what second runs provided for handles serves in one backward pass, and no longer than needed."""

    def __init__(self) -> None:
        self._task = NO_TASK
        self._provided: list[list[_Packed]] = []

    def provide(self, rebuild: Callable[[], None], handle: Handle) -> Tensor:
        """The tensor behind ``handle``, after ``rebuild`` if it is not there.

        Raises:
            MfxError: it was changed after it was saved.
        """
        if (task := current_task()) != self._task:
            self._enter(task)
        if handle.tensor is None:
            rebuild()
        tensor = handle.tensor
        assert tensor is not None, "the second run of a step did not reach what its first had saved"
        if tensor._version != handle.version:
            raise MfxError(
                f"a step changes in place a tensor of shape {tuple(tensor.shape)} that its backward pass needs, as in "
                "y = x.exp(); y.mul_(2), which is an error without mfx, too. Make the later operation out of place"
            )
        if self._task == NO_TASK:
            self.clear()
        return tensor

    def note(self, packed: list[_Packed]) -> None:
        """The handles of these have tensors now."""
        self._provided.append(packed)

    def clear(self) -> None:
        """Forget the tensors; handles that are asked for again are rebuilt again."""
        for reference, _, _ in chain.from_iterable(self._provided):
            if (handle := reference()) is not None:
                handle.tensor = None
        self._provided.clear()

    def _enter(self, task: int) -> None:
        # Nothing rebuilt in another pass may serve here: parameters may have changed between, which the rebuild checks.
        self.clear()
        self._task = task
        if task != NO_TASK:
            when_task_ends(partial(_clear_after, weakref.ref(self), task))


def _clear_after(this: weakref.ref[Rebuilt], task: int) -> None:
    rebuilt = this()
    if rebuilt is not None and rebuilt._task == task:
        rebuilt.clear()
        rebuilt._task = NO_TASK


class Frame:
    """A step as it ran in the forward pass. Knows its place in no tape, so that neither keeps the other alive."""

    _watched: frozenset[int] = frozenset()  # the numbers of the saved tensors that a second run is asked for

    def __init__(
        self,
        where: str,
        path: str,
        call: Branch,
        root: Any,
        captures: tuple[int, ...],
        values: Captures,
        world: StepEnvironment,
    ) -> None:
        self._where, self._path, self._call, self._root = where, path, call, root
        self._captures, self._values, self._world = captures, values, world
        self._packed: list[_Packed] = []
        self._requires_grad = False
        self.live: Tensor | None = None  # the input, while the forward is still running

    @property
    def tensors(self) -> list[Tensor | None]:
        """The parameters and buffers that the step reads."""
        return self._world.tensors

    def run(self, x: Tensor, values: Sequence[Any], unpack: Callable[[Handle], Tensor]) -> tuple[Any, ...]:
        """Run the step, under hooks whose handles ``unpack`` will be asked about."""
        self._requires_grad, self.live = x.requires_grad, x.detach()
        pack = self._pack if measure() is None else self._pack_measured
        with saved_tensors_hooks(pack, unpack):
            outputs = self._first_run(x, values)
        self.live = None
        self._world.settle()
        return outputs

    def _first_run(self, x: Tensor, values: Sequence[Any]) -> tuple[Any, ...]:
        try:
            return self._call(self._root, x, *(values[i] for i in self._captures))
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                raise
            raise MfxError(
                f"{self._where}, step {self._path}: this step uses a transform of torch.func, which cannot be run "
                "while its activations are left out. Use torch.autograd.grad in it, memory_budget=1.0, or skip it"
            ) from error

    def rerun(self, x: Tensor, rebuilt: Rebuilt, *, to_value: bool) -> Tensor | None:
        """Run the step again on ``x`` and provide what its handles stand for.

        Args:
            x: the step's input.
            rebuilt: is told of the handles.
            to_value: whether the branch's value is asked for. If it is not, the run stops as soon as it has saved as
                many tensors as the first one, as ``torch.utils.checkpoint`` does: what the branch does after that
                nobody reads. Buffers, flags and generators are put back in either case. Forward hooks may have effects
                elsewhere (sharding, a user's notes), so a step that has some runs to its end; and so does one that
                has random numbers to draw yet: ``rrelu`` fills a tensor with them that autograd has already saved.
                (No other operation of torch writes into an argument that it saves.)

        Returns:
            The branch's value; None if the run stopped before.

        Raises:
            MfxError: if it does not save the same number of tensors (more are not noticed by a run that stops), of the
                same shapes and dtypes.
        """
        unfinished = self.live is not None  # autograd is used inside the branch, while it is still running
        stops = not (to_value or unfinished or self._world.has_hooks)
        again = RecomputationHooks(self._packed, self._world.has_drawn_all if stops else None, self._watched)
        rebuilt.note(self._packed)
        values = self._values.get()
        with torch.enable_grad(), self._world.again(), saved_tensors_hooks(again.pack, _as_is):
            # As in the forward pass, the input is no leaf: autocast caches what it casts of leaves. (view_as would
            # change the strides of dimensions of size 1, by which convolutions choose their kernel.)
            x = x.detach().requires_grad_(self._requires_grad)[...]
            try:
                outputs = self._call(self._root, x, *(values[i] for i in self._captures))
            except Exception:
                if not again.stopped:  # else it is what the branch made of StopRecomputation
                    raise
        if again.wrong is not None or not (unfinished or again.count == len(self._packed)):
            raise MfxError(self._complaint(again))
        y: Tensor | None = None if again.stopped else outputs[0].detach()
        self._compare(again.seen, y)
        return y

    def _compare(self, seen: Mapping[int, Tensor], y: Tensor | None) -> None:
        """Look at what a second run gave: what it was asked for, and its value, unless it stopped before."""

    def _pack(self, tensor: Tensor) -> Handle:
        handle = Handle()
        self._packed.append((weakref.ref(handle), tensor.shape, tensor.dtype))
        return handle

    def _pack_measured(self, tensor: Tensor) -> Handle:
        if (step := measure()) is not None:
            step.saw(tensor)
        return self._pack(tensor)

    def _complaint(self, again: RecomputationHooks) -> str:
        what = again.wrong or f"saved {again.count} tensors, {len(self._packed)} in the forward pass"
        return (
            f"{self._where}, step {self._path}: the second run of this step, in the backward pass, {what}. A step must "
            "do the same both times: see that it depends on nothing that changed in between (Python state, an "
            "attribute, a global, a random number not drawn from torch), or skip it"
        )


class KeptStep:
    """Stands on a tape for a step that kept its activations: all that a walk back needs of it is its value."""

    live = None

    def __init__(self, y: Tensor, what: str) -> None:
        self._y: SavedTensors | None = SavedTensors([y], what)

    def rerun(self, x: Tensor, rebuilt: Rebuilt, *, to_value: bool) -> Tensor:
        """What running the step again would give."""
        assert self._y is not None, "a walk that is the last one has passed here"
        return self._y.get()[0]

    def release(self) -> None:
        """No walk will come here again."""
        self._y = None


class StopRecomputation(Exception):  # noqa: N818
    """Ends a second run from within, past whatever the branch has to clean up."""


class RecomputationHooks:
    """The hooks of a second run: hand over to live handles, in order, and check.

    Args:
        packed: what the first run saved.
        stops: whether the run may be ended after the last of them; None: it may not.
        watched: the numbers of those that are kept in ``seen``.
    """

    __slots__ = ("_packed", "_stops", "_task", "_watched", "count", "seen", "stopped", "wrong")

    def __init__(self, packed: list[_Packed], stops: Callable[[], bool] | None, watched: frozenset[int]) -> None:
        self._packed, self._stops, self._watched, self._task = packed, stops, watched, current_task()
        self.count = 0
        self.seen: dict[int, Tensor] = {}
        self.stopped = False
        self.wrong: str | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        """Take the value of the next handle, and stop early when it was the last."""
        if self.stopped:  # the branch has caught it
            raise StopRecomputation
        index, self.count = self.count, self.count + 1
        tensor = tensor.detach()
        if index in self._watched:
            self.seen[index] = tensor
        if index < len(self._packed) and self.wrong is None:
            reference, shape, dtype = self._packed[index]
            if tensor.dtype is not dtype or tensor.shape != shape:
                self.wrong = (
                    f"saved a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, as number {index}, "
                    f"{tuple(shape)}, {dtype} in the forward pass"
                )
            if (handle := reference()) is not None:
                handle.tensor, handle.version = tensor, tensor._version
        if self._stops is not None and self.count == len(self._packed) and self.wrong is None:
            # A backward pass inside the branch is not broken off, nor what has a mode to leave.
            self.stopped = may_be_ended() and current_task() == self._task and self._stops()
            if self.stopped:
                raise StopRecomputation
        # Kept by the second run's own graph too, which dies with the run: a branch may use autograd itself.
        return tensor


def _as_is(tensor: Tensor) -> Tensor:
    return tensor
