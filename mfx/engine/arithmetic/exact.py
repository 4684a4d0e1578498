"""Arithmetic "exact": x and v in int64 fixed point, walked back bit for bit."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from typing_extensions import Self, override

from mfx.engine.arithmetic.base import Frozen, State
from mfx.engine.arithmetic.integers import SMALL, nearest
from mfx.engine.arithmetic.range import Guard
from mfx.engine.arithmetic.store import DigitStore
from mfx.gamma import Gamma

__all__ = ["ExactState"]

_ONE = 2.0**40  # 1.0 in fixed point


class ExactState(State):
    """X and V, the integers nearest to 2⁴⁰·x and 2⁴⁰·v, and the digits that multiplying V by γ left over.

    Every sum is a sum of integers and every product is reversible, so walking back gives the very integers of the
    forward pass, if the branch gives the very same values: it reads ``stream()``, which depends on X alone.
    """

    verifiable = True
    rounds_input = True

    def __init__(self, X: Tensor, V: Tensor | None, store: DigitStore, dtype: torch.dtype, guard: Guard) -> None:
        self.X, self.V, self.store, self.dtype, self.guard = X, V, store, dtype, guard
        self.owned = True  # whether X and V may be overwritten
        self.first_v: Tensor | None = None
        self.steps = 0

    @classmethod
    @override
    def start(cls, x: Tensor, v: Tensor | None, *, reversible: bool) -> Self:
        guard = Guard()
        x, v = guard.admit(x.detach()), None if v is None else guard.admit(v.detach())
        X = _fixed(x, _ONE, guard)
        V = None if v is None else _fixed(v, _ONE, guard)
        state = cls(X, V, DigitStore(keep_limbs=reversible), x.dtype, guard)
        state.first_v = None if V is None or not reversible else V.sum()
        return state

    @staticmethod
    @override
    def anchor_every(gamma: Gamma, dtype: torch.dtype) -> int | None:
        return None

    @staticmethod
    @override
    def bytes_kept(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        bits = math.log2(gamma.denominator / gamma.numerator) * steps
        limbs = max(0, math.ceil((bits - math.log2(SMALL)) / 32))
        return 24 + 4 * limbs

    @override
    def stream(self) -> Tensor:
        return self.guard.mark(self.X.to(torch.float64).mul_(1 / _ONE).to(self.dtype))

    @override
    def advance(self, y: Tensor, kind: str, gamma: Gamma) -> None:
        F = self._increment(self.guard.admit(y), kind, gamma)
        if self.V is not None and not gamma.is_zero:
            V = self.V if self.owned else self.V.clone()
            F.add_(self.store.multiply(V, gamma.numerator, gamma.denominator, small=_small(self.guard)))
        self.V = F
        self.X = torch.add(self.X, F, out=self.X if self.owned else None)
        self.owned = True
        self.steps += 1
        self.guard.check(self.X)

    @override
    def retreat_x(self) -> None:
        self.X = torch.sub(self.X, self._velocity(), out=self.X if self.owned else None)

    @override
    def retreat_v(self, y: Tensor, kind: str, gamma: Gamma) -> None:
        F = self._increment(self.guard.clean(y), kind, gamma)
        V = torch.sub(self._velocity(), F, out=F)
        self.V, self.owned = None, True  # frees the old one before the division needs memory
        self.steps -= 1
        divides = not gamma.is_zero and (self.steps > 0 or self.first_v is not None)
        if divides:
            V = self.store.divide(V, gamma.numerator, gamma.denominator, small=_small(self.guard))
        self.V = V

    @override
    def freeze(self) -> Frozen:
        self.owned = self.store.owned = False
        tensors = (self.X, self._velocity(), *self.store.limbs)
        has_top = self.store.top is not None
        if self.store.top is not None:
            tensors = (*tensors, self.store.top)
        thaw = partial(_thaw, self.dtype, self.guard, tuple(self.store.spilled), has_top, self.steps, self.first_v)
        return Frozen(tensors, thaw)

    @override
    def is_start(self) -> Tensor:
        V = self._velocity()
        same_v = (V == 0).all() if self.first_v is None else V.sum() == self.first_v
        same = same_v & self.store.is_empty()
        # Poisoned elements are not walked back to where they came from.
        return same if self.guard.poison is None else same | self.guard.poison.any()

    @override
    def overflowed(self) -> Tensor | None:
        return self.guard.overflowed

    def _increment(self, y: Tensor, kind: str, gamma: Gamma) -> Tensor:
        """(1−γ)·f in fixed point: the one formula that both directions use."""
        if kind == "residual":
            return _fixed(y, gamma.rest * _ONE, self.guard)
        F = _fixed(y, _ONE, self.guard).sub_(self.X)
        return nearest(F.to(torch.float64).mul_(gamma.rest), small=_small(self.guard))

    def _velocity(self) -> Tensor:
        assert self.V is not None, "before the first step there is nothing to walk back"
        return self.V


def _fixed(t: Tensor, scale: float, guard: Guard) -> Tensor:
    return nearest(t.detach().to(torch.float64, copy=True).mul_(scale), small=_small(guard))


def _small(guard: Guard) -> bool:
    """Whether all of x, v and f fit into ``SMALL``: v is an average of f, and f of a map is a difference to x."""
    return guard.largest < SMALL / _ONE / 4


def _thaw(
    dtype: torch.dtype,
    guard: Guard,
    spilled: tuple[bool, ...],
    has_top: bool,
    steps: int,
    first_v: Tensor | None,
    tensors: tuple[Tensor, ...],
) -> ExactState:
    X, V, *limbs = tensors
    store = DigitStore(limbs.pop() if has_top else None, tuple(limbs))
    store.spilled = list(spilled)
    state = ExactState(X, V, store, dtype, guard)
    state.owned, state.steps, state.first_v = False, steps, first_v
    return state
