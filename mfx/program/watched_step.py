"""Watches one training step of a net: the most bytes alive between each two marks that its chains set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from typing_extensions import override

from mfx.compat import around_engine, bytes_made_since, operations_so_far
from mfx.engine import Phase
from mfx.engine.memory.peak import Lap
from mfx.ledger import StorageLedger, gradients_left_out
from mfx.meter import AllocatorLedger

# The marks at both ends of the forward pass, and at the begin of a backward pass.
_BEGIN, _BETWEEN, _BACKWARD = (-1, 0, Phase.RUN), (-1, 0, Phase.DONE), (-1, 1, Phase.RUN)


class LapCounter(Protocol):
    """Counts the bytes alive, lap by lap."""

    def lap(self) -> None:
        """Begin a new lap."""

    def laps(self) -> list[tuple[int, int]]:
        """Return of each lap the bytes at its start, and the most in it."""


class _Storages(StorageLedger):
    @classmethod
    @override
    def is_infra_mode(cls) -> bool:
        return True  # so that a compiled branch runs compiled


class WatchedStep:
    """A forward pass and the first backward pass through its chains.

    On a CPU storages are counted, by a dispatch mode that is on during both passes. What the caller makes between them,
    as for the loss, is not seen there: what the recorded operations have saved counts, and once more the largest of
    them. On a CUDA device the allocator's numbers are read.

    Args:
        counter: a counter that is on already, and counts nothing else; None: one is made.
        modules: those whose parameters and buffers do not count, nor do the gradients of the parameters.
    """

    def __init__(self, counter: LapCounter | None = None, modules: Sequence[nn.Module] = ()) -> None:
        self._stack = ExitStack()
        self._marks: list[tuple[int, int, Phase]] = [_BEGIN]
        self._saved_between = self._passing = self._held = 0  # bytes of the caller's
        self._last_operation = 0
        self._is_on: Callable[[], Any] = nullcontext
        self._is_reached = self._is_retained = False
        self._done: Callable[[list[Lap]], None] | None = None
        self._counter = self._count(modules) if counter is None else counter
        finalize(self, self._stack.close)  # hooks on parameters keep what they refer to alive

    def _count(self, modules: Sequence[nn.Module]) -> LapCounter:
        tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values()
        owners = [tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad]
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        if device.type == "cuda":
            allocated = AllocatorLedger(device, owners, timeline=False)
            self._stack.enter_context(gradients_left_out(allocated, owners))
            self._stack.enter_context(allocated)
            return allocated
        ledger = _Storages((*tensors, *(owner.grad for owner in owners)))
        self._stack.enter_context(gradients_left_out(ledger, owners))
        self._is_on = lambda: ledger
        return ledger

    def mark(self, chain: int, step: int, phase: Phase) -> None:
        """Begin a lap: a phase of a step."""
        self._is_reached = self._is_reached or phase is Phase.GRADIENT
        self._counter.lap()
        self._marks.append((chain, step, phase))

    @contextmanager
    def forward_pass(self, done: Callable[[list[Lap]], None]) -> Iterator[None]:
        """Enclose the forward pass; ``done`` is called with the laps when the backward pass has ended."""
        around_engine(_with_watched)
        try:
            with self._is_on():
                yield
        except BaseException:
            self.close()
            raise
        self._done = done
        self._last_operation = operations_so_far()
        self.mark(*_BETWEEN)
        _pending.steps.add(self)

    def close(self) -> None:
        """Stop watching."""
        self._done = None
        _pending.steps.discard(self)
        self._stack.close()

    @contextmanager
    def backward_pass(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], retains: bool
    ) -> Iterator[None]:
        """Enclose a backward pass, which may be one that does not come by here."""
        _pending.steps.discard(self)
        self.mark(*_BACKWARD)
        if self._is_on is not nullcontext:
            saved, passing = bytes_made_since(self._last_operation, roots)
            self._saved_between, self._passing = max(self._saved_between, saved), max(self._passing, passing)
            self._held = max(self._held, sum(t.nbytes for t in (*roots, *gradients) if t is not None and not t.dim()))
        try:
            with self._is_on():
                yield
        except BaseException:
            self.close()
            raise
        self._is_retained = self._is_retained or (retains and self._is_reached)
        if self._is_reached and not retains:
            self.finish()
        else:  # its backward pass is yet to come, or may come again
            _pending.steps.add(self)

    def finish(self) -> None:
        """Stop watching, and hand on the laps, if a backward pass has come by."""
        done, laps = self._done, self._laps() if self._is_reached else []
        self.close()
        if done is not None and laps:
            done(laps)

    def _laps(self) -> list[Lap]:
        end = self._marks.index(_BETWEEN)
        freed = next(i for i, (_, _, phase) in enumerate(self._marks) if phase is Phase.GRADIENT)
        more = [self._held if i >= end else 0 for i in range(len(self._marks))]
        for i in range(end, len(self._marks) if self._is_retained else freed):
            more[i] += self._saved_between
        more[end] += self._passing
        return [
            Lap(*mark, start + added, top + added)
            for mark, (start, top), added in zip(self._marks, self._counter.laps(), more, strict=True)
        ]


class _Pending(threading.local):
    def __init__(self) -> None:
        # After their forward passes; they live as long as the plans of their nets hold them.
        self.steps: WeakSet[WatchedStep] = WeakSet()


_pending = _Pending()


def _with_watched(
    engine: Callable[..., Any],
    roots: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    retains: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run autograd's engine, and have the steps watch that wait for a backward pass."""
    with ExitStack() as stack:
        for step in list(_pending.steps):
            stack.enter_context(step.backward_pass(roots, gradients, retains))
        return engine(roots, gradients, retains, *args, **kwargs)
