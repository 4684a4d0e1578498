"""Watches one training step of a net: the most bytes alive between each two marks that its chains set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol
from weakref import WeakSet, finalize

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
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
    """Storages, but for those of tensors, which may be parameters, and of their present gradients."""

    supports_higher_order_operators = True

    def __init__(self, excluded: Sequence[Tensor]) -> None:
        super().__init__(excluded)
        self._owners = [tensor for tensor in excluded if tensor.is_leaf and tensor.requires_grad]

    @override
    def __enter__(self) -> StorageLedger:
        super().__enter__()
        self._never |= self._keys(owner.grad for owner in self._owners)
        return self

    @classmethod
    @override
    def is_infra_mode(cls) -> bool:
        return True  # so that a compiled branch runs compiled


class WatchedStep:
    """A forward pass, and what backward passes come by its chains until all have their gradients.

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
        self._is_reached = self._is_retained = self._is_running = self._is_closed = False
        self._is_blind = False  # it has missed something: its laps are none
        self._missing: set[int] = set()  # chains whose gradients have not come
        self._done: Callable[[list[Lap]], None] | None = None
        self._counter = self._count(modules) if counter is None else counter
        finalize(self, self._stack.close)  # hooks on parameters keep what they refer to alive

    def _count(self, modules: Sequence[nn.Module]) -> LapCounter:
        tensors = [*{id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values()]
        owners = [tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad]
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        if device.type == "cuda":
            allocated = AllocatorLedger(device, owners, timeline=False)
            self._stack.enter_context(gradients_left_out(allocated, owners))
            self._stack.enter_context(allocated)
            return allocated
        ledger = _Storages(tensors)
        self._stack.enter_context(gradients_left_out(ledger, owners))
        self._is_on = lambda: ledger
        return ledger

    def mark(self, chain: int, step: int, phase: Phase) -> None:
        """Begin a lap: a phase of a step."""
        if self._is_closed:
            return
        if phase is Phase.GRADIENT and self._done is not None:  # else a branch uses autograd itself
            self._missing.discard(chain)
            self._is_reached = True
            self._is_blind = self._is_blind or not self._is_running
        elif phase is Phase.RUN and chain >= 0:
            self._missing.add(chain)
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
        self._done, self._is_closed = None, True
        _pending.steps.discard(self)
        self._stack.close()

    @contextmanager
    def backward_pass(
        self, roots: Sequence[Tensor | GradientEdge], gradients: Sequence[Tensor | None], retains: bool
    ) -> Iterator[None]:
        """Enclose a backward pass, which may be one that does not come by here, or through some of the chains only."""
        _pending.steps.discard(self)
        self.mark(*_BACKWARD)
        if self._is_on is not nullcontext:
            self._guess(roots, gradients)
        self._is_running = True
        try:
            with self._is_on():
                yield
        except BaseException:
            self.close()
            raise
        self._is_running = False
        self._is_retained = self._is_retained or (retains and self._is_reached)
        if self._is_reached and not (retains or self._missing):
            self.finish()
        else:  # its backward pass is yet to come, in part, or may come again
            _pending.steps.add(self)

    def _guess(self, roots: Sequence[Tensor | GradientEdge], gradients: Sequence[Tensor | None]) -> None:
        """Take note of what the caller has made for the backward pass."""
        try:
            saved, passing = bytes_made_since(self._last_operation, roots)
            scalars = [t for t in (*roots, *gradients) if isinstance(t, Tensor) and not t.dim()]
            self._saved_between, self._passing = max(self._saved_between, saved), max(self._passing, passing)
            self._held = max(self._held, sum(tensor.nbytes for tensor in scalars))
        except Exception:  # tensors of a kind whose sizes are not numbers: nothing is known of this step
            self._is_blind = True

    def finish(self) -> bool:
        """Stop watching, and hand on the laps; return whether a backward pass has come by."""
        done, laps = self._done, self._laps() if self._done is not None and self._is_reached else []
        self.close()
        if done is not None and laps and not self._is_blind:
            done(laps)
        return self._is_reached

    def _laps(self) -> list[Lap]:
        end = self._marks.index(_BETWEEN)
        freed = next(i for i, mark in enumerate(self._marks) if i > end and mark[2] is Phase.GRADIENT)
        guessed = [0] * len(self._marks)
        for i in range(end, len(self._marks) if self._is_retained else freed):
            guessed[i] = self._saved_between
        guessed[end] += self._passing
        return [
            Lap(*mark, start + more, top + more + (self._held if i >= end else 0), more)
            for i, (mark, (start, top), more) in enumerate(zip(self._marks, self._counter.laps(), guessed, strict=True))
        ]


class _Pending(threading.local):
    def __init__(self) -> None:
        # After their forward passes; they live as long as the plans of their nets hold them.
        self.steps: WeakSet[WatchedStep] = WeakSet()


_pending = _Pending()


def _with_watched(
    engine: Callable[..., Any],
    roots: Sequence[Tensor | GradientEdge],
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
