"""The momentum coefficient: a fraction of small integers, for good or with signs that every call draws."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import torch

from mfx_passes.errors import MfxError

_TOLERANCE = Fraction(1, 10**6)
_LARGEST_DENOMINATOR = 2**14


@dataclass(frozen=True)
class BDIA:
    """Momentum of random sign and mean 0: γ = ±``magnitude`` in training, γ = 0, the model itself, in evaluation.

    The signs are drawn at the start of every call of a chain, by one ``torch.randint(0, 2, (steps,))`` on the stream's
    device (``(steps, batch)`` if ``per`` is ``"sample"``), where 1 is +; the first step has γ = 0. Training or
    evaluation is what the innermost module says that owns all steps of the chain. (Zhang, Lewis, Kleijn, "On Exact
    Bit-level Reversible Transformers Without Changing Architectures", 2024.)

    Args:
        magnitude: of γ, between 0 and 1; below 1/3 for chains with steps h(x) (a normalisation or an activation follows
            the sum), which larger ones can make unstable.
        per: ``"call"``: each step has one sign; ``"sample"``: one for each row of the stream's dimension ``dim``.
        dim: the batch dimension.

    Raises:
        MfxError: an argument has a value that it cannot have.
    """

    magnitude: float = 0.25
    per: str = "call"
    dim: int = 0

    def __post_init__(self) -> None:
        given: object = self.magnitude
        is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
        if not is_number or not 0 < self.magnitude < 1:
            raise MfxError(
                f"BDIA(magnitude={self.magnitude!r}): the magnitude of gamma is a real number between 0 and 1, such as "
                "0.25. For the original model use gamma=0."
            )
        if self.per not in ("call", "sample"):
            raise MfxError(f"BDIA(per={self.per!r}): signs are drawn per 'call' or per 'sample'.")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool):
            raise MfxError(f"BDIA(dim={self.dim!r}): the batch dimension of the stream is an integer, mostly 0.")
        Gamma.of(self.magnitude)


class Drawn(NamedTuple):
    """The way in which the signs of γ are drawn; see `BDIA`."""

    per: str
    dim: int


@dataclass(frozen=True)
class Gamma:
    """γ = ``numerator`` / ``denominator`` in [0, 1], the same in every mode; 1 only for a `mfx.MomentumNet`.

    With ``drawn``, that is its magnitude: in training calls draw signs, and in evaluation γ is 0.

    >>> Gamma.of(0.9)
    Gamma(numerator=9, denominator=10, drawn=None)
    """

    numerator: int
    denominator: int
    drawn: Drawn | None = None

    @classmethod
    def of(cls, value: float | BDIA | Gamma, *, or_one: bool = False) -> Gamma:
        """Return the fraction that ``value`` is, else the simplest within 1e-6 of it; denominators go up to 2**14.

        Args:
            value: γ.
            or_one: allow γ = 1, at which the velocity stays what it was before the first step.

        Raises:
            MfxError: ``value`` is not a real number in [0, 1), or too close to 0 or 1 to be told from it.
        """
        if isinstance(value, Gamma):
            return value
        if isinstance(value, BDIA):
            return replace(cls.of(value.magnitude), drawn=Drawn(value.per, value.dim))
        given: object = value
        is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
        if is_number and or_one and value == 1:
            return cls(1, 1)
        if not is_number or not 0 <= float(value) < 1:
            why = ": no branch would count, and without a velocity to start from, x would stay as it is"
            why = why if is_number and value == 1 else ""
            raise MfxError(
                f"gamma must be a real number with 0 <= gamma < 1, not {value!r}{why}. For random signs: mfx.BDIA."
            )
        exact = Fraction(float(value))
        if exact == 0:
            return cls(0, 1)
        nearest = exact.limit_denominator(_LARGEST_DENOMINATOR)
        if float(nearest) == float(value):  # 9999/10000, and not 9900/9901, which is within 1e-6 too
            return cls(nearest.numerator, nearest.denominator)
        fraction = _simplest_between(max(exact - _TOLERANCE, Fraction(0)), exact + _TOLERANCE)
        if fraction.denominator > _LARGEST_DENOMINATOR:
            fraction = nearest
        if not 0 < fraction < 1:
            steps = 1 if fraction == 0 else _LARGEST_DENOMINATOR - 1
            raise MfxError(
                f"gamma = {value!r} cannot be told from {int(fraction)}; the nearest gamma that works is "
                f"{steps}/{_LARGEST_DENOMINATOR} = {steps / _LARGEST_DENOMINATOR!r}"
            )
        return cls(fraction.numerator, fraction.denominator)

    @cached_property
    def value(self) -> float:
        """γ as a Python float."""
        return self.numerator / self.denominator

    @cached_property
    def complement(self) -> float:
        """1 − γ, rounded once."""
        return (self.denominator - self.numerator) / self.denominator

    @cached_property
    def carried(self) -> float:
        """1 − γ, or 1 at γ = 1: the share of g that is carried from an update with this γ to the one before."""
        return self.complement or 1.0

    @cached_property
    def ratio(self) -> float:
        """γ / (1 − γ): the gradient of v, by what an update with this γ carried of it."""
        return self.value / self.carried

    @cached_property
    def is_zero(self) -> bool:
        """True if γ is 0, where a chain computes what the original model does."""
        return self.numerator == 0

    @cached_property
    def is_one(self) -> bool:
        """True if γ is 1, where branches have no weight."""
        return self.numerator == self.denominator

    @cached_property
    def has_signs(self) -> bool:
        """True if calls in training draw signs of γ."""
        return self.drawn is not None and not self.is_zero

    @property
    def in_evaluation(self) -> Gamma:
        """γ that calls in evaluation have."""
        return self if self.drawn is None else Gamma(0, 1)

    @property
    def given(self) -> float | BDIA:
        """γ as a user writes it."""
        return BDIA(self.value, *self.drawn) if self.drawn is not None and self.has_signs else self.value

    def with_magnitude(self, value: float | Gamma) -> Gamma:
        """Return γ of another magnitude, with signs as before.

        Raises:
            MfxError: see `of`.
        """
        return replace(Gamma.of(value), drawn=self.drawn) if self.drawn else Gamma.of(value)

    def __neg__(self) -> Gamma:
        """Return −γ, which an update of a chain with signs may have."""
        return Gamma(-self.numerator, self.denominator)

    def __format__(self, form: str) -> str:
        """Format the value as a float, behind ± if signs are drawn."""
        return ("±" if self.has_signs else "") + format(self.value, form)

    # What arithmetic asks of γ of one update. `mfx.engine.arithmetic.signed` has the same for one with signs.

    @property
    def averages(self) -> bool:
        """True if the velocity is an average of what was added to it."""
        return True

    def largest(self, v: float, f: float) -> float:
        """Return the largest magnitude of γ·v + (1−γ)·f, from those of v and f, that an update with this γ leads to."""
        return max(v, f)

    @property
    def magnitude(self) -> Gamma:
        """The magnitude, as γ without a sign."""
        return self

    def rows_in(self, x: torch.Tensor) -> tuple[torch.Tensor | None, int, int]:
        """Return the draws of the signs, with stride and number of rows in the memory of ``x``, None without signs."""
        return None, 1, 1

    def factor(self, of: Callable[[Gamma], float], like: torch.Tensor) -> float | torch.Tensor:
        """Return a number that depends on γ: one for the whole stream, or a tensor that goes with ``like``."""
        return of(self)

    def signs_like(self, x: torch.Tensor, *, dense: bool = False) -> tuple[torch.Tensor, ...]:
        """Return a tensor of 1 and −1 for the elements of ``x`` in a tuple, which is empty where none is needed."""
        return ()

    def complement_at(self, *signs: torch.Tensor) -> Any:
        """Return 1 − γ where γ has these signs: float, or float64 tensor."""
        return self.complement


def check_velocity_with(gamma: Gamma, *, is_default: bool) -> None:
    """Check that a chain whose γ has signs starts as it must: the first step adds f(x) in full, whatever v was.

    Raises:
        MfxError: it has another velocity to start from.
    """
    if gamma.drawn is not None and not is_default:
        raise MfxError(
            "gamma=mfx.BDIA(...) begins with a step at gamma = 0, so a velocity before it would count for nothing. "
            "Leave velocity (init_speed of a MomentumNet) at its default, or give the chain a number as gamma."
        )


def _simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """Return the fraction with the smallest denominator in [low, high], by descending the Stern–Brocot tree."""
    whole = math.floor(low)
    if whole == low:
        return Fraction(whole)
    if whole + 1 <= high:
        return Fraction(whole + 1)
    return whole + 1 / _simplest_between(1 / (high - whole), 1 / (low - whole))
