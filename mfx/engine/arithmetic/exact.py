"""Arithmetic "exact": x and v in fixed point, walked back bit for bit."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from typing_extensions import Self, override

from mfx.engine.arithmetic.base import Frozen, State
from mfx.engine.arithmetic.blocks import blocks, can_be_split
from mfx.engine.arithmetic.bounds import Bounds, RangeCheck
from mfx.engine.arithmetic.digit_store import LIMB, DigitStore
from mfx.engine.arithmetic.integers import ONE, SMALL, nearest
from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels, increment, read
from mfx.options.gamma import Gamma


class ExactState(State):
    """X and V, the integers nearest to 2⁴⁰·x and 2⁴⁰·v, and the digits that multiplying V by γ left over.

    Every sum is a sum of integers and every product is reversible, so walking back gives the very integers of the
    forward pass, if the branch gives the very same values: it reads the stream, which depends on X alone.

    The integers are float64 while they are known to be small enough for that, and int64 from then on.
    """

    name = "exact"
    verifiable = True
    rounds_input = True

    def __init__(
        self, X: Tensor, V: Tensor | None, store: DigitStore, dtype: torch.dtype, guard: RangeCheck, kernels: Kernels
    ) -> None:
        self.X, self.V, self.store, self.dtype, self.guard, self.kernels = X, V, store, dtype, guard, kernels
        self.owns_x = self.owns_v = True  # whether it may be overwritten
        self.first_v: Tensor | None = None
        self.mark: Tensor | None = None  # what a walk back must come to, if it ends before the start
        self.steps = 0
        self.reach = Bounds(math.inf, math.inf)

    @classmethod
    @override
    def start(cls, x: Tensor, v: Tensor | None, *, reversible: bool, kernels: Kernels = BLOCK_KERNELS) -> Self:
        guard = RangeCheck()
        x = guard.admit(x.detach())
        reach = Bounds(guard.largest, 0.0)
        if v is not None:
            v = guard.admit(v.detach())
            reach = Bounds(guard.largest, guard.largest)
        dtype = torch.float64 if can_be_split(x) and reach.is_small else torch.int64
        X = _fixed(x, dtype)
        # Laid out in memory as X is, whatever v was.
        V = None if v is None else torch.empty_like(X).copy_(_fixed(v, dtype))
        state = cls(X, V, DigitStore(keep_limbs=reversible), x.dtype, guard, kernels)
        state.first_v = None if V is None or not reversible else _sum(V)
        state.reach = reach
        return state

    @staticmethod
    @override
    def anchor_every(gamma: Gamma, dtype: torch.dtype) -> int | None:
        return None

    @staticmethod
    @override
    def bytes_kept(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        # A velocity that starts at zero leaves no digits when it is multiplied first.
        bits = math.log2(gamma.denominator / gamma.numerator) * (steps - 1)
        limbs = max(0, math.ceil((bits - math.log2(SMALL)) / LIMB))
        return 24 + LIMB // 8 * limbs

    @override
    def stream(self) -> Tensor:
        out = self._new_stream()
        for x, part, scratch in blocks(self.X, out, scratch=1):
            read(x, part, scratch)
        return self.guard.mark(out)

    @override
    def advance(self, y: Tensor, kind: str, gamma: Gamma) -> Tensor:
        y = self.guard.admit(y)
        self._make_room_for_step(kind)
        self._own_x()
        if self.V is None or gamma.is_zero:
            out = self._take_as_velocity(y, kind, gamma)
        else:
            out = self._add_to_velocity(y, kind, gamma)
        self.owns_v = True
        self.steps += 1
        if self.X.dtype == torch.int64:
            self.guard.check(self.X)
        return self.guard.mark(out)

    @override
    def retreat_x(self) -> Tensor:
        self._own_x()
        out = self._new_stream()
        self.kernels.retreat_x(self.X, self._velocity(), out)
        return self.guard.mark(out)

    @override
    def retreat_v(self, y: Tensor, kind: str, gamma: Gamma) -> None:
        # Where the forward pass found nothing bad there is nothing to clean.
        y = y if self.guard.poison is None else self.guard.clean(y)
        V = self._own_v()
        self.steps -= 1
        if gamma.is_zero or (self.steps == 0 and self.first_v is None):
            for x, v, f, scratch in blocks(self.X, V, y, scratch=1):
                v.sub_(increment(f, x, kind, gamma, scratch))
            return
        self.kernels.retreat_v(self.X, V, self.store.before_divide(), y, kind, gamma)
        self.store.after_divide()

    @override
    def freeze(self) -> Frozen:
        self.owns_x = self.owns_v = self.store.owned = False
        tensors = (self.X, self._velocity(), *self.store.limbs)
        has_top = self.store.top is not None
        if self.store.top is not None:
            tensors = (*tensors, self.store.top)
        past = self.steps, self.first_v, self.mark
        thaw = partial(_thaw, self.dtype, self.guard, self.kernels, tuple(self.store.spilled), has_top, past)
        return Frozen(tensors, thaw)

    @override
    def remember_start(self) -> None:
        self.mark = self._fingerprint()

    @override
    def is_start(self) -> Tensor:
        V = self._velocity()
        if self.mark is not None:
            same = (self._fingerprint() == self.mark).all()
        else:
            same_v = torch.count_nonzero(V) == 0 if self.first_v is None else _sum(V) == self.first_v
            same = same_v & self.store.is_empty()
        # Poisoned elements are not walked back to where they came from.
        return same if self.guard.poison is None else same | self.guard.poison.any()

    @override
    def overflowed(self) -> Tensor | None:
        return self.guard.overflowed

    def _fingerprint(self) -> Tensor:
        V = _sum(self._velocity())
        top = torch.zeros_like(V) if self.store.top is None else _sum(self.store.top)
        return torch.stack([V, top, *map(_sum, self.store.limbs)])

    def _take_as_velocity(self, y: Tensor, kind: str, gamma: Gamma) -> Tensor:
        V, out = torch.empty_like(self.X), self._new_stream()
        for x, v, f, part, scratch in blocks(self.X, V, y, out, scratch=1):
            v.copy_(increment(f, x, kind, gamma, scratch))
            read(x.add_(v), part, scratch)
        self.V = V
        return out

    def _add_to_velocity(self, y: Tensor, kind: str, gamma: Gamma) -> Tensor:
        V, out = self._own_v(), self._new_stream()
        top = self.store.before_multiply(gamma.numerator, gamma.denominator, V)
        self.kernels.advance(self.X, V, top, y, out, kind, gamma)
        return out

    def _make_room_for_step(self, kind: str) -> None:
        """Go over to int64 if the next step may need it."""
        if self.X.dtype == torch.int64:
            return
        y = self.guard.largest
        after = self.reach.after_step(y, kind)
        if not after.is_small:
            # The bound of x grows with every step, x itself need not.
            after = Bounds(self.X.abs().amax().item() / ONE, self.reach.v).after_step(y, kind)
        self.reach = after
        if not after.is_small:
            self.X, self.owns_x = self.X.to(torch.int64), True
            if self.V is not None:
                self.V, self.owns_v = self.V.to(torch.int64), True
            self.store.to(torch.int64)

    def _own_x(self) -> None:
        if not self.owns_x:
            self.X, self.owns_x = self.X.clone(), True

    def _own_v(self) -> Tensor:
        V = self._velocity()
        if not self.owns_v:
            V = self.V = V.clone()
            self.owns_v = True
        return V

    def _velocity(self) -> Tensor:
        assert self.V is not None, "before the first step there is nothing to walk back"
        return self.V

    def _new_stream(self) -> Tensor:
        return torch.empty_like(self.X, dtype=self.dtype)


def _fixed(t: Tensor, dtype: torch.dtype) -> Tensor:
    return nearest(t.to(torch.float64, copy=True).mul_(ONE), dtype)


def _sum(V: Tensor) -> Tensor:
    """The sum of all integers, modulo 2⁶⁴: the same in whatever order they are added."""
    return torch.stack([part.to(torch.int64).sum() for (part,) in blocks(V)]).sum()


def _thaw(
    dtype: torch.dtype,
    guard: RangeCheck,
    kernels: Kernels,
    spilled: tuple[bool, ...],
    has_top: bool,
    past: tuple[int, Tensor | None, Tensor | None],
    tensors: tuple[Tensor, ...],
) -> ExactState:
    X, V, *limbs = tensors
    store = DigitStore(limbs.pop() if has_top else None, tuple(limbs))
    store.spilled = list(spilled)
    state = ExactState(X, V, store, dtype, guard, kernels)
    state.owns_x = state.owns_v = False
    state.steps, state.first_v, state.mark = past
    return state
