"""The store of digits that makes multiplication of integers by a fraction reversible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from mfx.engine.arithmetic.blocks import blocks

# Tops stay below. Far below 2⁶³, so that nothing wraps; twelve bits more would save less than one limb.
TOP_LIMIT = 2**50
# Bits of a limb. When the top, at 2³⁶ or more, has no room left for a digit, at least 2²⁰ of it stay: much more than
# 1/(1−γ), or else the bound would grow by a digit at a time rather than by a factor 1/γ.
LIMB = 16
# Dtypes of a narrow top, by bits. Those of int16 and int32 are read without a sign: torch has few operations on uint16.
_NARROW = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def grow(bound: int, n: int, d: int) -> tuple[int, bool]:
    """Return the bound of a store's top after one more multiplication by n/d, and if a limb is filled before it."""
    spills = bound * d + d - 1 >= TOP_LIMIT
    if spills:
        bound >>= LIMB
    return (bound * d + d - 1) // n, spills


def bytes_stored(n: int, d: int, multiplications: int) -> int:
    """Return the bytes per element that a store takes after so many multiplications by n/d, its top narrowed."""
    known = _stored(n, d)
    while len(known) <= multiplications:
        bound, limbs = known[-1]
        bound, spills = grow(bound, n, d)
        known.append((bound, limbs + spills))
    bound, limbs = known[multiplications]
    return narrowest(bound).itemsize * (multiplications > 0) + LIMB // 8 * limbs


@lru_cache(maxsize=64)
def _stored(n: int, d: int) -> list[tuple[int, int]]:
    """Return the list that ``bytes_stored`` grows: bound and number of limbs after 0, 1, … multiplications."""
    return [(0, 0)]


def narrowest(bound: int) -> torch.dtype:
    """Return the dtype with the fewest bytes for integers from 0 to ``bound``."""
    return next((dtype for bits, dtype in _NARROW.items() if bound < 2**bits), torch.int64)


def widen(top: Tensor) -> Tensor:
    """Return a narrow top as int64."""
    return top.to(torch.int64).bitwise_and_(2 ** (8 * top.dtype.itemsize) - 1)


def multiply(v: Tensor, top: Tensor, n: int, d: int) -> None:
    """V ← v·n/d, where ``top`` takes in the digit v mod d and gives up one below n.

    With q = ⌊v/d⌋ the store holds w = d·top + (v − d·q), then t = ⌊w/n⌋, and gives w − n·t; v becomes n·q + (w − n·t).

    Args:
        v: integers, written over.
        top: non-negative integers of which d times one is below ``TOP_LIMIT``, written over.
        n: the numerator.
        d: the denominator.
    """
    q = torch.div(v, d, rounding_mode="floor")
    w = v.add_(top.sub_(q), alpha=d)
    t = torch.div(w, n, rounding_mode="floor", out=top)
    w.add_(q.sub_(t), alpha=n)


def divide(v: Tensor, top: Tensor, n: int, d: int) -> None:
    """Undo ``multiply``; the arguments as there."""
    q = torch.div(v, n, rounding_mode="floor")
    w = v.add_(top.sub_(q), alpha=n)
    t = torch.div(w, d, rounding_mode="floor", out=top)
    w.add_(q.sub_(t), alpha=d)


class DigitStore:
    """One non-negative integer per element, of any size, that takes in what ``multiply`` cannot keep.

    v·n/d is not an integer. ``multiply`` pushes the digit v mod d, which division by d would lose, and pops a digit
    below n, which multiplication by n has room for: v ← n·⌊v/d⌋ + popped digit. Both are bijections, so ``divide``
    undoes them; the store grows by log2(d/n) bits each time. Maclaurin et al., "Gradient-based Hyperparameter
    Optimization through Reversible Learning", ICML 2015, with general fractions.

    The content is an int64 ``top`` and the int16 ``limbs`` below it. ``bound``, a Python integer, is the largest that
    ``top`` can be. When the next push could take it past ``TOP_LIMIT``, the low bits move to a new limb. That depends
    on no data. ``multiply`` and ``divide`` work on ``top`` between ``before_multiply`` and ``after_divide``. While
    nothing works on it, the top may be narrow: as few bytes as ``bound`` needs.
    """

    def __init__(self, *, keep_limbs: bool = True) -> None:
        self.top: Tensor | None = None  # int64; narrow where not owned
        self.limbs: list[Tensor] = []
        self.bound = 0
        self.history: list[tuple[int, bool]] = []  # by multiplication: the bound before it, if it filled a limb
        self.keep_limbs = keep_limbs  # only ``after_divide`` reads them
        self.owned = True

    def before_multiply(self, n: int, d: int, like: Tensor) -> Tensor:
        """Return the top, ready for a multiplication by n/d of integers ``like`` those given."""
        top = self.top
        if top is None or not self.owned:
            top = self.top = torch.zeros_like(like) if top is None else self._own()
        before = self.bound
        self.bound, spills = grow(before, n, d)
        self.history.append((before, spills))
        if spills:
            self._spill(top)
        return top

    def before_divide(self) -> Tensor:
        """Return the top, ready for the division that undoes the last multiplication."""
        return self.top if self.owned and self.top is not None else self._own()

    def after_divide(self) -> None:
        """Refill the top from a limb, if the multiplication had moved one out."""
        assert self.top is not None
        self.bound, spilled = self.history.pop()
        if spilled:
            for part, low in blocks(self.top, self.limbs.pop()):
                part.mul_(2**LIMB).add_(low.to(torch.int64).bitwise_and_(2**LIMB - 1))

    def is_empty(self) -> Tensor | bool:
        """True if every element's integer is zero; a 0-dim tensor unless nothing was multiplied."""
        return self.top is None or (not self.limbs and torch.count_nonzero(self.top) == 0)

    def freeze(self) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], DigitStore]]:
        """Return limbs and narrowed top, into which nothing is written from now on, and how to make a store of them."""
        thaw = partial(_thaw, self.bound, tuple(self.history), self.top is not None)
        if self.top is None:
            return tuple(self.limbs), thaw
        top = self.top.to(narrowest(self.bound)) if self.owned else self.top
        self.owned = top is not self.top
        return (*self.limbs, top), thaw

    def _own(self) -> Tensor:
        assert self.top is not None, "nothing was multiplied"
        if not self.owned:
            self.top = self.top.clone() if self.top.dtype is torch.int64 else widen(self.top)
            self.owned = True
        return self.top

    def _spill(self, top: Tensor) -> None:
        """Move the low bits of the top to a new limb."""
        limb = torch.empty_like(top, dtype=torch.int16) if self.keep_limbs else None
        for part, *low in blocks(top) if limb is None else blocks(top, limb):
            for into in low:
                into.copy_(part)  # keeps the low bits
            part.bitwise_right_shift_(LIMB)
        if limb is not None:
            self.limbs.append(limb)


def _thaw(bound: int, history: Sequence[tuple[int, bool]], has_top: bool, tensors: Sequence[Tensor]) -> DigitStore:
    store = DigitStore()
    store.bound, store.history = bound, list(history)
    store.limbs = list(tensors)
    if has_top:
        store.top, store.owned = store.limbs.pop(), False
    return store
