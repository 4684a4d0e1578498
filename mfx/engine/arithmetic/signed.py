"""γ = ±n/d of one update of a stream, with signs that lie on the stream's device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor

from mfx.compat import unprofiled, without_function_modes, without_modes
from mfx.options.gamma import Gamma


@dataclass(frozen=True, eq=False)
class Signed:
    """γ of one update, of one magnitude and of signs that were drawn; they are never read by the host.

    Args:
        magnitude: |γ|, above 0.
        draws: int64, where 1 is + and 0 is −: of shape () for the whole stream, (rows,) for the rows of ``dim``.
        dim: the dimension of the stream that the rows are of, not negative.
    """

    magnitude: Gamma
    draws: Tensor
    dim: int
    is_zero = is_one = averages = False

    @property
    def numerator(self) -> int:
        """The numerator of |γ|."""
        return self.magnitude.numerator

    @property
    def denominator(self) -> int:
        """The denominator of |γ|."""
        return self.magnitude.denominator

    def largest(self, v: float, f: float) -> float:
        """Return the largest magnitude of γ·v + (1−γ)·f, from those of v and f."""
        return self.magnitude.value * v + (1 + self.magnitude.value) * f

    def rows_in(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Return the draws, with the stride and the number of their rows in the memory of ``x``."""
        if self.draws.dim() == 0:
            return self.draws, 1, 1
        return self.draws, max(1, x.stride(self.dim)), x.shape[self.dim]

    def factor(self, of: Callable[[Gamma], float], like: Tensor) -> Tensor:
        """Return ``of`` of γ where it is positive and of −γ elsewhere, as a tensor that broadcasts with ``like``."""
        plus, minus = (_number(of(gamma), like) for gamma in (self.magnitude, -self.magnitude))
        return torch.where(self._rows(like) == 1, plus, minus)

    def signs_like(self, x: Tensor, *, dense: bool = False) -> tuple[Tensor]:
        """Return a tensor of 1 and −1: of shape (), or int8 and laid out in memory as ``x`` is.

        Args:
            x: the stream's integers.
            dense: always the second.
        """
        signs = self._rows(x) * 2 - 1
        if signs.dim() == 0 and not dense:
            return (signs,)
        return (torch.empty_like(x, dtype=torch.int8).copy_(signs),)

    def complement_at(self, *signs: Tensor) -> Tensor:
        """Return 1 − γ where γ has these signs, float64."""
        (sign,) = signs
        plus, minus = (
            torch.full((), gamma.complement, dtype=torch.float64, device=sign.device)
            for gamma in (self.magnitude, -self.magnitude)
        )
        return torch.where(sign > 0, plus, minus)

    def _rows(self, like: Tensor) -> Tensor:
        """Return the draws with as many dimensions as ``like``, or none."""
        if self.draws.dim() == 0:
            return self.draws
        return self.draws.view([-1 if dim == self.dim else 1 for dim in range(like.dim())])


UpdateGamma: TypeAlias = Gamma | Signed
# For ``factor``.
value_of, complement_of = attrgetter("value"), attrgetter("complement")
ratio_of, carried_by = attrgetter("ratio"), attrgetter("carried")


def multiplier(gamma: UpdateGamma, of: Callable[[Gamma], float], like: Tensor) -> float | Tensor:
    """Return ``factor`` of γ, as what ``like`` is multiplied with, or divided by, soonest; the result is the same.

    On a CPU a number is made a tensor of float64 every time, and that one of the dtype.
    """
    factor = gamma.factor(of, like)
    if type(factor) is float and like.is_cpu and type(like) is Tensor:
        return _kept_number(factor, like.dtype)
    return factor


@lru_cache(maxsize=256)
def _kept_number(value: float, dtype: torch.dtype) -> Tensor:
    with unprofiled(), without_modes(), without_function_modes(), torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def _number(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)  # made there: a copy would wait for it


def add_scaled(t: Tensor, other: Tensor, factor: float | Tensor, *, in_place: bool = False) -> Tensor:
    """Return t + factor·other, where the product is rounded by itself if the factor is a tensor."""
    if isinstance(factor, Tensor):
        product = other.to(torch.promote_types(t.dtype, other.dtype)) * factor  # one of shape () would not widen it
        return t.add_(product) if in_place else t + product
    return t.add_(other, alpha=factor) if in_place else torch.add(t, other, alpha=factor)
