"""The store of digits that makes multiplying an integer by a fraction reversible."""

from __future__ import annotations

import torch
from torch import Tensor

from mfx.engine.arithmetic.blocks import blocks
from mfx.engine.arithmetic.integers import SMALL, floor_divide

_LIMIT = SMALL - 1
# Bits of a limb. When the top, at 2³⁶ or more, has no room left for a digit, at least 2²⁰ of it stay: much more than
# 1/(1−γ), or else the bound would grow by a digit at a time rather than by a factor 1/γ.
LIMB = 16


def multiply(v: Tensor, top: Tensor, n: int, d: int, scratch: Tensor) -> None:
    """V ← v·n/d, where ``top`` takes in the digit v mod d and gives up one below n.

    With q = ⌊v/d⌋ the store holds w = d·top + (v − d·q), then t = ⌊w/n⌋, and gives w − n·t; v becomes n·q + (w − n·t).

    Args:
        v: integers, written over.
        top: non-negative integers of which d times one is below ``SMALL``, written over.
        n: the numerator.
        d: the denominator.
        scratch: of the same shape and dtype.
    """
    q = floor_divide(v, d, out=scratch)
    w = v.add_(top.sub_(q), alpha=d)
    t = floor_divide(w, n, out=top)
    w.add_(q.sub_(t), alpha=n)


def divide(v: Tensor, top: Tensor, n: int, d: int, scratch: Tensor) -> None:
    """What undoes ``multiply``; the arguments as there."""
    q = floor_divide(v, n, out=scratch)
    w = v.add_(top.sub_(q), alpha=n)
    t = floor_divide(w, d, out=top)
    w.add_(q.sub_(t), alpha=d)


class DigitStore:
    """One non-negative integer per element, of any size, in which ``multiply`` leaves what it cannot keep.

    v·n/d is not an integer. ``multiply`` pushes the digit v mod d, which division by d would lose, and pops a digit
    below n, which multiplication by n has room for: v ← n·⌊v/d⌋ + popped digit. Both are bijections, so ``divide``
    undoes them; the store grows by log2(d/n) bits each time. Maclaurin et al., "Gradient-based Hyperparameter
    Optimization through Reversible Learning", ICML 2015, with general fractions.

    The content is a ``top`` of eight bytes and the int16 ``limbs`` below it. ``bound``, a Python integer, is the
    largest that ``top`` can be; when the next push could take it past ``SMALL``, the low bits move to a new limb. That
    depends on no data. ``multiply`` and ``divide`` work on ``top`` between ``before_multiply`` and ``after_divide``.
    """

    def __init__(self, top: Tensor | None = None, limbs: tuple[Tensor, ...] = (), *, keep_limbs: bool = True) -> None:
        self.top = top
        self.limbs = list(limbs)
        self.bound = 0
        self.spilled: list[bool] = []  # for each multiplication, whether a limb was filled before it
        self.keep_limbs = keep_limbs  # who never divides needs none
        self.owned = top is None

    def before_multiply(self, n: int, d: int, like: Tensor) -> Tensor:
        """The top, ready for a multiplication by n/d of integers ``like`` those given."""
        top = torch.zeros_like(like) if self.top is None else self._own()
        self.top = top
        self.spilled.append(self.bound * d + d - 1 > _LIMIT)
        if self.spilled[-1]:
            self._spill(top)
        self.bound = (self.bound * d + d - 1) // n
        return top

    def before_divide(self) -> Tensor:
        """The top, ready for the division that undoes the last multiplication."""
        self.top = self._own()
        return self.top

    def after_divide(self) -> None:
        """Fill the top again from a limb, if the multiplication had moved one out."""
        assert self.top is not None
        if self.spilled.pop():
            for part, low in blocks(self.top, self.limbs.pop()):
                part.mul_(2**LIMB).add_(low.to(torch.int64).bitwise_and_(2**LIMB - 1))

    def to(self, dtype: torch.dtype) -> None:
        """Keep the top as ``dtype`` from now on."""
        if self.top is not None:
            self.top, self.owned = self.top.to(dtype), True

    def is_empty(self) -> Tensor | bool:
        """Whether every element's integer is zero, as a 0-dim tensor."""
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
            whole = part.to(torch.int64)
            for into in low:
                into.copy_(whole)  # keeps the low bits
            part.copy_(whole >> LIMB)
        if limb is not None:
            self.limbs.append(limb)
        self.bound >>= LIMB
