"""Arithmetic "exact": x and v in fixed point, walked back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial

import torch
from torch import Tensor
from typing_extensions import Self, override

from mfx.engine.arithmetic.base import Frozen, State
from mfx.engine.arithmetic.blocks import blocks
from mfx.engine.arithmetic.digit_store import LIMB, TOP_LIMIT, DigitStore, bytes_stored
from mfx.engine.arithmetic.integers import ONE, nearest
from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels, increment, read
from mfx.engine.arithmetic.range_check import RangeCheck
from mfx.engine.arithmetic.signed import UpdateGamma
from mfx.options.gamma import Gamma


class ExactState(State):
    """X and V, the integers nearest to 2⁴⁰·x and 2⁴⁰·v, and the digits that multiplying V by γ left over.

    Every sum is a sum of integers and every product is reversible, so walking back gives the very integers of the
    forward pass, if the branch gives the very same values: it reads the stream, which depends on X alone.
    """

    name = "exact"
    verifiable = True
    needs_float64 = True
    rounds_input = True

    def __init__(
        self,
        X: Tensor,
        V: Tensor | None,
        store: DigitStore,
        dtype: torch.dtype,
        range_check: RangeCheck,
        kernels: Kernels,
    ) -> None:
        self.X, self.V, self.store = X, V, store
        self.dtype, self.range_check, self.kernels = dtype, range_check, kernels
        self.owns_x = self.owns_v = True  # whether X, V may be overwritten
        self.start_v_sum: Tensor | None = None  # the sum of V before the first step; None if V was zero
        self.start_fingerprint: Tensor | None = None  # set by ``remember_start``
        self.start_steps = 0  # at which a walk back ends; set by it, too
        self.steps = 0

    @classmethod
    @override
    def start(cls, x: Tensor, v: Tensor | None, *, reversible: bool, kernels: Kernels = BLOCK_KERNELS) -> Self:
        range_check = RangeCheck()
        X = _fixed(range_check.admit(x.detach()))
        # Laid out in memory as X is, whatever v was.
        V = None if v is None else torch.empty_like(X).copy_(_fixed(range_check.admit(v.detach())))
        state = cls(X, V, DigitStore(keep_limbs=reversible), x.dtype, range_check, kernels)
        state.start_v_sum = None if V is None or not reversible else V.sum()
        return state

    @staticmethod
    @override
    def anchor_every(gamma: Gamma, dtype: torch.dtype) -> int | None:
        return None

    @staticmethod
    @override
    def bytes_counted(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        # Decides which function a chain computes, so it may not depend on how narrow the store is: a word of it counts.
        bits = math.log2(gamma.denominator / gamma.numerator) * (steps - 1)
        limbs = max(0, math.ceil((bits - math.log2(TOP_LIMIT)) / LIMB))
        return 24 + LIMB // 8 * limbs

    @staticmethod
    @override
    def bytes_kept(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        # A velocity that starts at zero leaves no digits when it is multiplied first.
        return 16 + bytes_stored(gamma.numerator, gamma.denominator, steps - 1)

    @override
    def stream(self) -> Tensor:
        out = self._new_stream()
        for x, part in blocks(self.X, out):
            read(x, part)
        return self.range_check.poison(out)

    @override
    def advance(self, y: Tensor, kind: str, gamma: UpdateGamma) -> Tensor:
        y = self.range_check.admit(y)
        self._own_x()
        if self.V is None or gamma.is_zero:
            out = self._take_as_velocity(y, kind, gamma)
        else:
            out = self._add_to_velocity(y, kind, gamma)
        self.owns_v = True
        self.steps += 1
        self.range_check.check(self.X, self._velocity(), kind, gamma)
        return self.range_check.poison(out)

    @override
    def retreat_x(self) -> Tensor:
        self._own_x()
        out = self._new_stream()
        self.kernels.retreat_x(self.X, self._velocity(), out)
        return self.range_check.poison(out)

    @override
    def retreat_v(self, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        # Where the forward pass found nothing bad there is nothing to clean.
        y = y if self.range_check.poisoned is None else self.range_check.clean(y)
        V = self._own_v()
        self.steps -= 1
        if gamma.is_zero or (self.steps == 0 and self.start_v_sum is None):
            for x, v, f, *signs in blocks(self.X, V, y, *gamma.signs_like(self.X)):
                v.sub_(increment(f, x, kind, gamma, *signs))
            return
        self.kernels.retreat_v(self.X, V, self.store.before_divide(), y, kind, gamma)
        self.store.after_divide()

    @override
    def freeze(self) -> Frozen:
        self.owns_x = self.owns_v = False
        digits, thaw_store = self.store.freeze()
        rest = copy(self)
        del rest.X, rest.V, rest.store
        return Frozen((self.X, self._velocity(), *digits), partial(_thaw, rest, thaw_store))

    @override
    def remember_start(self) -> None:
        self.start_fingerprint, self.start_steps = self._fingerprint(), self.steps

    @override
    def is_start(self) -> Tensor:
        V = self._velocity()
        if self.start_fingerprint is not None:
            same = (self._fingerprint() == self.start_fingerprint).all()
        else:
            same_v = torch.count_nonzero(V) == 0 if self.start_v_sum is None else V.sum() == self.start_v_sum
            same = same_v & self.store.is_empty()
        # Poisoned elements are not walked back to where they came from.
        return same if (poisoned := self._any_poisoned()) is None else same | poisoned

    @override
    def overflowed(self) -> Tensor | None:
        return self.range_check.overflowed

    def _any_poisoned(self) -> Tensor | None:
        return None if self.range_check.poisoned is None else self.range_check.poisoned.any()

    def _fingerprint(self) -> Tensor:
        # Sums modulo 2⁶⁴, the same in whatever order the integers are added.
        V = self._velocity().sum()
        top = torch.zeros_like(V) if self.store.top is None else self.store.top.sum()
        return torch.stack([V, top, *(limb.sum() for limb in self.store.limbs)])

    def _take_as_velocity(self, y: Tensor, kind: str, gamma: UpdateGamma) -> Tensor:
        V, out = torch.empty_like(self.X), self._new_stream()
        for x, v, f, part, *signs in blocks(self.X, V, y, out, *gamma.signs_like(self.X)):
            v.copy_(increment(f, x, kind, gamma, *signs))
            read(x.add_(v), part)
        self.V = V
        return out

    def _add_to_velocity(self, y: Tensor, kind: str, gamma: UpdateGamma) -> Tensor:
        V, out = self._own_v(), self._new_stream()
        top = self.store.before_multiply(gamma.numerator, gamma.denominator, V)
        self.kernels.advance(self.X, V, top, y, out, kind, gamma)
        return out

    def _own_x(self) -> None:
        if not self.owns_x:
            self.X, self.owns_x = self.X.clone(), True

    def _own_v(self) -> Tensor:
        if not self.owns_v:
            self.V, self.owns_v = self._velocity().clone(), True
        return self._velocity()

    def _velocity(self) -> Tensor:
        assert self.V is not None, "before the first step there is nothing to walk back"
        return self.V

    def _new_stream(self) -> Tensor:
        return torch.empty_like(self.X, dtype=self.dtype)


def _fixed(t: Tensor) -> Tensor:
    return nearest(t.to(torch.float64, copy=True).mul_(ONE))


def _thaw(
    rest: ExactState, thaw_store: Callable[[Sequence[Tensor]], DigitStore], tensors: tuple[Tensor, ...]
) -> ExactState:
    state = copy(rest)
    state.X, state.V, *digits = tensors
    state.store = thaw_store(digits)
    return state
