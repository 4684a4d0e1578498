"""A frame: one step of one call, run under hooks that keep nothing, and recomputed when a saved tensor is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any
from weakref import ref

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mfx.compat import current_stream, current_task, is_refused_draw
from mfx.engine.recompute.environment import StepEnvironment
from mfx.engine.recompute.rebuilt import Handle, Packed, Rebuilt
from mfx.engine.recompute.saved import Captures, SavedTensors, freed
from mfx.engine.scope import inside_recomputation, measure
from mfx.modules.uninterrupted import may_stop
from mfx_passes.errors import MfxError

Branch = Callable[..., tuple[Any, ...]]
_requires_grad = attrgetter("requires_grad")


class Frame:
    """A step as it ran in the forward pass. It holds no tape, so that neither keeps the other alive."""

    _watched: frozenset[int] = frozenset()  # numbers of the saved tensors to compare after recomputation

    def __init__(
        self,
        where: str,
        path: str,
        call: Branch,
        root: Any,
        captures: tuple[int, ...],
        writes: int,
        values: Captures,
        env: StepEnvironment,
    ) -> None:
        self._where, self._path, self._call, self._root = where, path, call, root
        self._captures, self._writes, self._values, self._env = captures, writes, values, env
        self._packed: list[Packed] = []
        self._requires_grad: list[bool] = []
        self.live: Sequence[Tensor] | None = None  # the input, while the branch is running, or if it was interrupted
        self._interruption: type[BaseException] | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """The parameters and buffers that the step reads."""
        return self._env.tensors

    def run(self, xs: Sequence[Tensor], values: Sequence[Any], unpack: Callable[[Handle], Tensor]) -> tuple[Any, ...]:
        """Run the step, under hooks whose handles ``unpack`` turns into tensors."""
        self._requires_grad, self.live = [*map(_requires_grad, xs)], xs
        pack = self._pack if measure() is None else self._pack_measured
        try:
            with saved_tensors_hooks(pack, unpack):
                if (context := self._env.reproducible()) is None:
                    outputs = self._first_run(xs, values)
                else:
                    with context:
                        outputs = self._first_run(xs, values)
        except BaseException as error:
            # What was computed so far may have been noted elsewhere, by a hook, and be differentiated later.
            self.live, self._interruption = [x.detach() for x in xs], type(error)
            raise
        self.live = None
        self._env.settle()
        return outputs

    def _first_run(self, xs: Sequence[Tensor], values: Sequence[Any]) -> tuple[Any, ...]:
        try:
            return self._call(self._root, *xs, *map(values.__getitem__, self._captures))
        except RuntimeError as error:
            if is_refused_draw(error):
                raise MfxError(
                    f"{self._where}, step {self._path}: this step draws random numbers while a graph is captured, and "
                    "its recomputation could not draw them again. Use memory_budget=1.0, or leave the net out of the "
                    "capture"
                ) from error
            if "support saved tensor hooks" not in str(error):
                raise
            raise MfxError(
                f"{self._where}, step {self._path}: this step uses a transform of torch.func, which cannot be run "
                "while its activations are left out. Use torch.autograd.grad in it, memory_budget=1.0, or skip it"
            ) from error

    def rerun(self, xs: Sequence[Tensor], rebuilt: Rebuilt, *, to_value: bool) -> Sequence[Tensor] | None:
        """Recompute the step on ``xs`` and give its handles their tensors.

        Args:
            xs: the states that the step reads.
            rebuilt: takes note of the handles.
            to_value: compute the branch's values. If False, the recomputation stops early, as soon as it has saved as
                many tensors as the forward pass, as in ``torch.utils.checkpoint``: what the branch does after that is
                not read. Buffers, flags and generators are put back in either case. A step with forward hooks runs to
                its end, for hooks may have effects elsewhere (sharding, a user's notes). So does a step that has
                random numbers left to draw: ``rrelu`` fills a tensor with them that autograd has already saved. (No
                other operation of torch writes into an argument that it saves.)

        Returns:
            The branch's values; None after an early stop.

        Raises:
            MfxError: the number of saved tensors, a shape or a dtype differs from the forward pass. (After an early
                stop, more saved tensors go unnoticed.)
        """
        # The branch, which has not ended, uses autograd, which needs what it saved; or what the forward pass saved.
        unfinished = self.live is not None
        stops = not (to_value or unfinished or self._env.has_hooks)
        hooks = RecomputationHooks(self._packed, self._env.has_drawn_all if stops else None, self._watched)
        rebuilt.provided.append(self._packed)
        values = self._values.get()
        with (
            inside_recomputation(),
            self._env.restored(),
            saved_tensors_hooks(hooks.pack, _as_is),
        ):
            # As in the forward pass, an input is not a leaf: autocast caches its casts of leaves. (view_as would
            # change the strides of dimensions of size 1, by which convolutions choose their kernel.)
            xs = [x.detach().requires_grad_(flag)[...] for x, flag in zip(xs, self._requires_grad, strict=True)]
            before, self.live = self.live, xs
            try:
                outputs = self._call(self._root, *xs, *map(values.__getitem__, self._captures))
            except BaseException as error:
                # The branch may have turned StopRecomputation into this.
                if type(error) is not self._interruption and not (hooks.stopped and isinstance(error, Exception)):
                    raise
                outputs = None
            finally:
                self.live = before
        if hooks.wrong is not None or not (unfinished or hooks.count == len(self._packed)):
            raise MfxError(self._complaint(hooks))
        ys = None if hooks.stopped or outputs is None else [y.detach() for y in outputs[: self._writes]]
        self._compare(hooks.seen, ys)
        return ys

    def _compare(self, seen: Mapping[int, Tensor], ys: Sequence[Tensor] | None) -> None:
        """Compare the watched tensors, and the values unless there was an early stop, with the forward pass."""

    def _pack(self, tensor: Tensor) -> Handle:
        handle = Handle()
        handle.tensor = None
        self._packed.append((ref(handle), tensor.shape, tensor.dtype))
        return handle

    def _pack_measured(self, tensor: Tensor) -> Handle:
        if (step := measure()) is not None:
            step.saw(tensor)
        return self._pack(tensor)

    def _complaint(self, hooks: RecomputationHooks) -> str:
        what = hooks.wrong or f"saved {hooks.count} tensors, {len(self._packed)} in the forward pass"
        return (
            f"{self._where}, step {self._path}: the recomputation of this step, in the backward pass, {what}. A step "
            "must do the same both times: see that it depends on nothing that changed in between (Python state, an "
            "attribute, a global, a random number not drawn from torch), or skip it"
        )


class KeptStep:
    """Stands on a tape for a step that kept its activations: a walk back needs its values only."""

    live = None

    def __init__(self, ys: Sequence[Tensor], what: str) -> None:
        self._what = what
        self._ys: SavedTensors | None = SavedTensors(ys, what)

    def rerun(self, xs: Sequence[Tensor], rebuilt: Rebuilt, *, to_value: bool) -> Sequence[Tensor]:
        """Return the values that recomputation would give."""
        if self._ys is None:
            raise freed(self._what)
        return self._ys.get()

    def release(self) -> None:
        """Free the values: no walk will pass here any more."""
        self._ys = None


class StopRecomputation(Exception):  # noqa: N818
    """Stops a recomputation early, from within, through whatever the branch has to clean up."""


class RecomputationHooks:
    """The saved-tensor hooks of a recomputation: give tensors to live handles, in order, and check them.

    Args:
        packed: the saved tensors of the forward pass.
        stops: returns True if the run may stop early after the last of them; None: it may not.
        watched: numbers of the tensors to keep in ``seen``.
    """

    __slots__ = ("_last", "_limit", "_packed", "_stops", "_task", "_watched", "count", "seen", "stopped", "wrong")

    def __init__(self, packed: list[Packed], stops: Callable[[], bool] | None, watched: frozenset[int]) -> None:
        self._packed, self._stops, self._watched, self._task = packed, stops, watched, current_task()
        self._limit = len(packed)
        self._last = self._limit - 1 if stops is not None else -1
        self.count = 0
        self.seen: dict[int, Tensor] = {}
        self.stopped = False
        self.wrong: str | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        """Give the next handle its tensor, and stop early if it is the last one."""
        if self.stopped:  # the branch has caught the exception
            raise StopRecomputation
        index = self.count
        self.count = index + 1
        tensor = tensor.detach()
        if index in self._watched:
            self.seen[index] = tensor
        if index < self._limit:
            reference, shape, dtype = self._packed[index]
            if tensor.dtype is not dtype or tensor.shape != shape:
                self._limit = 0  # nothing is given to the others
                self.wrong = (
                    f"saved a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, as number {index}, "
                    f"{tuple(shape)}, {dtype} in the forward pass"
                )
            handle = reference()
            if handle is not None:
                handle.made_in = None if tensor.is_cpu else current_stream(tensor.device)
                handle.version = tensor._version
                handle.tensor = tensor  # the last: another thread may look
        if index == self._last and self._stops is not None and self.wrong is None:
            # A backward pass inside the branch is not stopped, nor code that has a mode to leave.
            self.stopped = may_stop() and current_task() == self._task and self._stops()
            if self.stopped:
                raise StopRecomputation
        # The recomputation's own graph keeps it too, and is freed with it: a branch may use autograd itself.
        return tensor


def _as_is(tensor: Tensor) -> Tensor:
    return tensor
