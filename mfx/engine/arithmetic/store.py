"""The store of digits that makes multiplying an integer by a fraction reversible."""

from __future__ import annotations

import torch
from torch import Tensor

from mfx.engine.arithmetic.integers import SMALL, floor_divide

__all__ = ["DigitStore"]

_LIMIT = SMALL - 1
_LIMB = 32


class DigitStore:
    """One non-negative integer per element, of any size, in which ``multiply`` leaves what it cannot keep.

    v·n/d is not an integer. ``multiply`` pushes the digit v mod d, which division by d would lose, and pops a digit
    below n, which multiplication by n has room for: v ← n·⌊v/d⌋ + popped digit. Both are bijections, so ``divide``
    undoes them; the store grows by log2(d/n) bits each time. Maclaurin et al., "Gradient-based Hyperparameter
    Optimization through Reversible Learning", ICML 2015, with general fractions.

    The content is an int64 ``top`` and the int32 ``limbs`` below it. ``bound``, a Python integer, is the largest that
    ``top`` can be; when the next push could take it past ``SMALL``, the low 32 bits move to a new limb. That depends on
    no data.
    """

    def __init__(self, top: Tensor | None = None, limbs: tuple[Tensor, ...] = (), *, keep_limbs: bool = True) -> None:
        self.top = top
        self.limbs = list(limbs)
        self.bound = 0
        self.spilled: list[bool] = []  # for each multiplication, whether a limb was filled before it
        self.keep_limbs = keep_limbs  # who never divides needs none
        self.owned = top is None

    def multiply(self, v: Tensor, n: int, d: int, *, small: bool = False) -> Tensor:
        """v·n/d, in a buffer of its own; ``small``: |v| is known to be below ``SMALL``. Overwrites ``v``."""
        if self.top is None:
            self.top = torch.zeros_like(v)
        top = self._make_room(d)
        quotient = floor_divide(v, d, small=small)
        digit = v.sub_(quotient, alpha=d)
        top.mul_(d).add_(digit)
        self.top = floor_divide(top, n, small=True, out=digit)
        popped = top.sub_(self.top, alpha=n)
        self.bound = (self.bound * d + d - 1) // n
        return popped.add_(quotient, alpha=n)

    def divide(self, v: Tensor, n: int, d: int, *, small: bool = False) -> Tensor:
        """The ``v`` that ``multiply(v, n, d)`` was last called with; ``small``: as there. Overwrites ``v``."""
        assert self.top is not None, "nothing was multiplied"
        quotient = floor_divide(v, n, small=small)
        digit = v.sub_(quotient, alpha=n)
        top = torch.add(digit, self.top, alpha=n, out=digit)
        self.top = floor_divide(top, d, small=True, out=self.top if self.owned else None)
        self.owned = True
        pushed = top.sub_(self.top, alpha=d)
        if self.spilled.pop():
            limb = self.limbs.pop().to(torch.int64).bitwise_and_(2**_LIMB - 1)
            self.top.bitwise_left_shift_(_LIMB).bitwise_or_(limb)
        return pushed.add_(quotient, alpha=d)

    def is_empty(self) -> Tensor | bool:
        """Whether every element's integer is zero, as a 0-dim tensor."""
        return self.top is None or (not self.limbs and (self.top == 0).all())

    def _make_room(self, d: int) -> Tensor:
        assert self.top is not None
        spill = self.bound * d + d - 1 > _LIMIT
        self.spilled.append(spill)
        top = self.top if self.owned else self.top.clone()
        self.owned = True
        if spill:
            if self.keep_limbs:
                self.limbs.append(top.to(torch.int32))  # keeps the low bits
            top.bitwise_right_shift_(_LIMB)
            self.bound >>= _LIMB
        return top
