"""Bytes of storages by the operations that make them, without those of parameters' gradients."""

from __future__ import annotations

import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mfx.compat import accumulates, memory_of, put_accumulate_hook_first, shapes_accumulated_next


class Ledger(Protocol):
    """A count that is told of the gradients of leaves."""

    def notice_grads(self, grads: Iterable[torch.Tensor | None]) -> None:
        """Notice what autograd is about to accumulate."""

    def leave_out_grad(self, owner: torch.Tensor) -> None:
        """Stop counting what autograd has left as a leaf's gradient."""


@contextmanager
def gradients_left_out(ledger: Ledger, owners: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within this context, a ledger leaves out what autograd brings to these leaves, and what it leaves there."""
    with ExitStack() as stack:
        for owner in owners:
            stack.callback(put_accumulate_hook_first(owner, ledger.leave_out_grad).remove)
            if not (is_lazy(owner) or torch.is_inference_mode_enabled()):
                accumulator = get_gradient_edge(owner).node
                stack.callback(accumulator.register_prehook(ledger.notice_grads).remove)
                stack.callback(id, accumulator)  # its tensor refers to it weakly
        yield


class _Uncounted(threading.local):
    now = False


_uncounted = _Uncounted()


@contextmanager
def uncounted() -> Iterator[None]:
    """Count no tensor that this thread makes in this context: it stands for one elsewhere, as in host memory."""
    before, _uncounted.now = _uncounted.now, True
    try:
        yield
    finally:
        _uncounted.now = before


@dataclass(eq=False)
class Life:
    """The life of a storage.

    Attributes:
        size: bytes.
        birth: number of the operation that made it.
        death: number of the first operation that did not find it; None if it is alive.
        parts: the storages that autograd put it together from, if it may become a gradient.
        brought: number of operations outside of accumulations when autograd brought it to a leaf.
        is_grad: True if it is, or became, a gradient that is left out.
        reference: weak; by it the end is noticed.
    """

    size: int
    birth: int
    death: int | None = None
    parts: tuple[Life, ...] = ()
    brought: int | None = None
    is_grad: bool = False
    reference: weakref.ref[torch.UntypedStorage] | None = None


class StorageLedger(TorchDispatchMode):
    """Every storage born under this mode, by the address of its C++ object, with its size.

    The reference to the storage's Python object is weak; torch keeps that object alive exactly as long as the storage.
    That a storage becomes a gradient turns out later: its bytes are then taken out of the timeline, from its birth on.

    Args:
        excluded: tensors that do not count.
        keep_lives: keep the lives of dead storages, too.
    """

    def __init__(self, excluded: Sequence[torch.Tensor | None], *, keep_lives: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.timeline = array("q")
        self.peak_with_grads = 0
        self._laps: list[int] = []
        self._grad_bytes = 0
        self._excluded = excluded
        self._never: frozenset[int] = frozenset()
        self._born: dict[int, Life] = {}  # alive
        self._outside = 0
        self._lives: list[Life] | None = [] if keep_lives else None

    @property
    def peak(self) -> int:
        """The largest ``live`` after an operation."""
        return max(self.timeline, default=0)

    def lap(self) -> None:
        """Begin a new lap; the first one begins by itself."""
        self._laps.append(len(self.timeline))

    def laps(self) -> list[tuple[int, int]]:
        """Return of each lap ``live`` at its start, and the largest."""
        edges = pairwise([0, *self._laps, len(self.timeline)])
        levels = (self.timeline[max(0, first - 1) : max(1, end)] or [0] for first, end in edges)
        return [(lap[0], max(lap)) for lap in levels]

    def largest_at_peak(self) -> Life | None:
        """Return the life of the largest storage that counted at the peak; None if there is none, or none was kept."""
        at = self.timeline.index(self.peak) if self.timeline else 0
        counted = (life for life in self._lives or () if not life.is_grad)
        alive = (life for life in counted if life.birth <= at and (life.death is None or at < life.death))
        return max(alive, key=lambda life: life.size, default=None)

    def lives_of(self, leaves: Iterable[object]) -> list[Life]:
        """Return the lives of the storages of the tensors among ``leaves``, as far as they count."""
        return [self._born[key] for key in self._keys(leaves) if key in self._born]

    def peak_with(self, lives: Iterable[Life]) -> int:
        """Return what the peak would be, were these storages still there."""
        freed = sorted((life.death, life.size) for life in lives if life.death is not None and not life.is_grad)
        before, peak, held = 0, 0, 0
        for death, size in (*freed, (len(self.timeline), 0)):
            peak = max(peak, max(self.timeline[before:death], default=0) + held)
            before, held = death, held + size
        return peak

    def __enter__(self) -> StorageLedger:
        self._never = self._keys(self._excluded)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _uncounted.now:
            return func(*args, **kwargs)
        # An argument's storage existed before, unless its creation was seen. (torch.tensor() creates one unseen, then
        # lifts it.)
        before = frozenset() if func in _LIFTS else self._keys(tree_iter((args, kwargs)))
        result = func(*args, **kwargs)
        self._outside += not accumulates()
        joined = before if _puts_gradient_together(func, result) else ()
        parts = [self._born[key] for key in joined if key in self._born]
        for storage in self._storages(tree_iter(result)):
            key = memory_of(storage)
            if key in self._born or (key not in before and key not in self._never):
                life = self._enter(key, storage)
                life.parts += tuple(part for part in parts if part is not life)
        self.timeline.append(self.live)
        self.peak_with_grads = max(self.peak_with_grads, self.live + self._grad_bytes)
        return result

    def notice_grads(self, grads: Iterable[torch.Tensor | None]) -> None:
        """Leave out what autograd is about to accumulate, but for what is still needed for other gradients then."""
        for key in self._keys(grads):
            if key in self._born:
                self._born[key].brought = self._outside

    def leave_out_grad(self, owner: torch.Tensor) -> None:
        """Do not count what autograd has left as a tensor's gradient, nor count it for the time before."""
        for key in self._keys([owner.grad]):
            if key in self._born:
                self._leave_out(self._born[key])

    def _leave_out(self, life: Life) -> None:
        waiting = [life]
        while waiting:
            life = waiting.pop()
            if life.is_grad:
                continue
            life.is_grad = True
            waiting += [part for part in life.parts if part.death is not None]
            for number in range(life.birth, len(self.timeline) if life.death is None else life.death):
                self.timeline[number] -= life.size
            if life.death is None:
                self.live -= life.size
                self._grad_bytes += life.size

    def _storages(self, leaves: Iterable[object]) -> Iterator[torch.UntypedStorage]:
        """Return the storages of ``leaves`` that count."""
        return (storage for storage in storages(leaves) if storage.device.type != "meta")

    def _keys(self, leaves: Iterable[object]) -> frozenset[int]:
        return frozenset(memory_of(storage) for storage in self._storages(leaves))

    def _enter(self, key: int, storage: torch.UntypedStorage) -> Life:
        size = storage.nbytes()
        if key in self._born and self._born[key].size == size:
            return self._born[key]
        self._forget(key)
        life = Life(size, len(self.timeline), reference=weakref.ref(storage, lambda _: self._forget(key)))
        self._born[key] = life
        self.live += size
        if self._lives is not None:
            self._lives.append(life)
        return life

    def _forget(self, key: int) -> None:
        life = self._born.pop(key, None)
        if life is None:
            return
        if life.is_grad:
            self._grad_bytes -= life.size
        else:
            self.live -= life.size
        life.death, life.reference = len(self.timeline), None
        if life.brought == self._outside:
            self._leave_out(life)


_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)

# By these, autograd puts a gradient together: sums of what several uses bring, zeros in which some entries are set,
# pieces of a tensor that was cut, a cast.
_JOINS = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add_.Tensor,
    torch.ops.aten.cat.default,
    torch.ops.aten.stack.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_add.default,
    torch.ops.aten.scatter_add.default,
    torch.ops.aten._to_copy.default,
)


def _puts_gradient_together(func: Any, result: object) -> bool:
    """True if autograd runs an operation for the gradient of a leaf, whose shape the result has."""
    return func in _JOINS and isinstance(result, torch.Tensor) and result.shape in shapes_accumulated_next()


def storages(leaves: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors among ``leaves``: of sparse ones, those of indices and values."""
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.layout == torch.strided:
            yield leaf.untyped_storage()
        elif leaf.layout == torch.sparse_coo:
            yield from (part.untyped_storage() for part in (leaf._indices(), leaf._values()))
