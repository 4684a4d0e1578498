"""The store of digits that makes multiplication of integers by a fraction reversible."""

from __future__ import annotations

import torch
from torch import Tensor

from mfx.engine.arithmetic.blocks import blocks

# Tops stay below. Far below 2⁶³, so that nothing wraps; twelve bits more would save less than one limb.
TOP_LIMIT = 2**50
# Bits of a limb. When the top, at 2³⁶ or more, has no room left for a digit, at least 2²⁰ of it stay: much more than
# 1/(1−γ), or else the bound would grow by a digit at a time rather than by a factor 1/γ.
LIMB = 16


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
    on no data. ``multiply`` and ``divide`` work on ``top`` between ``before_multiply`` and ``after_divide``.
    """

    def __init__(self, top: Tensor | None = None, limbs: tuple[Tensor, ...] = (), *, keep_limbs: bool = True) -> None:
        self.top = top
        self.limbs = list(limbs)
        self.bound = 0
        self.spilled: list[bool] = []  # for each multiplication, whether a limb was filled before it
        self.keep_limbs = keep_limbs  # only ``after_divide`` reads them
        self.owned = top is None

    def before_multiply(self, n: int, d: int, like: Tensor) -> Tensor:
        """Return the top, ready for a multiplication by n/d of integers ``like`` those given."""
        top = torch.zeros_like(like) if self.top is None else self._own()
        self.top = top
        self.spilled.append(self.bound * d + d - 1 >= TOP_LIMIT)
        if self.spilled[-1]:
            self._spill(top)
        self.bound = (self.bound * d + d - 1) // n
        return top

    def before_divide(self) -> Tensor:
        """Return the top, ready for the division that undoes the last multiplication."""
        self.top = self._own()
        return self.top

    def after_divide(self) -> None:
        """Refill the top from a limb, if the multiplication had moved one out."""
        assert self.top is not None
        if self.spilled.pop():
            for part, low in blocks(self.top, self.limbs.pop()):
                part.mul_(2**LIMB).add_(low.to(torch.int64).bitwise_and_(2**LIMB - 1))

    def is_empty(self) -> Tensor | bool:
        """True if every element's integer is zero; a 0-dim tensor unless nothing was multiplied."""
        return self.top is None or (not self.limbs and torch.count_nonzero(self.top) == 0)

    def _own(self) -> Tensor:
        assert self.top is not None, "nothing was multiplied"
        top = self.top if self.owned else self.top.clone()
        self.owned = True
        return top

    def _spill(self, top: Tensor) -> None:
        """Move the low bits of the top to a new limb."""
        limb = torch.empty_like(top, dtype=torch.int16) if self.keep_limbs else None
        for part, *low in blocks(top) if limb is None else blocks(top, limb):
            for into in low:
                into.copy_(part)  # keeps the low bits
            part.bitwise_right_shift_(LIMB)
        if limb is not None:
            self.limbs.append(limb)
        self.bound >>= LIMB
