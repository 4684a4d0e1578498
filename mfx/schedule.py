"""γ as a function of the training step: schedules, and the scheduler that sets it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mfx.net.gammas import set_magnitude
from mfx.options.gamma import Gamma
from mfx_passes import MfxError

__all__ = ["Annealing", "GammaScheduler", "cosine", "linear"]

Schedule = Callable[[int], "float | Mapping[str, float]"]
_GRID = 1024


class GammaScheduler:
    """Sets the momentum of a net step by step, as ``torch.optim.lr_scheduler`` sets learning rates.

    The momentum for step 0 is set at once. Nothing is captured or compiled anew; see `mfx.set_gamma`.

    Args:
        net: a momentumized net.
        schedule: γ for step 0, 1, 2 …, a number or a mapping from chain names to numbers; `mfx.schedule.linear` and
            `mfx.schedule.cosine` make some. For chains with an `mfx.BDIA` it is the magnitude.

    Raises:
        MfxError: the schedule gives an invalid γ, or the net has not been momentumized.

    Attributes:
        last_step: the step that the current γ is for.
    """

    def __init__(self, net: nn.Module, schedule: Schedule) -> None:
        check_schedule(schedule)
        self.net = net
        self.schedule = schedule
        self.last_step = -1
        self._last: float | dict[str, float] = 0.0
        self.step()

    def step(self) -> None:
        """Go on to the next step's γ; usually after every ``optimizer.step()``, or after every epoch.

        Raises:
            MfxError: the schedule gives an invalid γ; the net keeps the γ it has.
        """
        self._set(self.last_step + 1, self.schedule(self.last_step + 1))

    def get_last_gamma(self) -> float | dict[str, float]:
        """Return the γ that the schedule gave last."""
        return dict(self._last) if isinstance(self._last, dict) else self._last

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state as plain data; the schedule itself is not part of it."""
        return {"last_step": self.last_step, "gamma": self.get_last_gamma()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from another scheduler's state, and set the net to its γ.

        Args:
            state_dict: from `state_dict`.

        Raises:
            MfxError: the γ in it fits none of this net's chains.
        """
        self._set(state_dict["last_step"], state_dict["gamma"])

    def _set(self, step: int, gamma: float | Mapping[str, float]) -> None:
        set_magnitude(self.net, gamma)
        self.last_step = step
        self._last = {k: float(v) for k, v in gamma.items()} if isinstance(gamma, Mapping) else float(gamma)


def check_schedule(schedule: Any, or_none: bool = False) -> None:
    """Check that something can be called for γ of a step.

    Args:
        schedule: what is meant as a schedule.
        or_none: allow None as well.

    Raises:
        MfxError: it cannot.
    """
    if not callable(schedule) and not (or_none and schedule is None):
        raise MfxError(
            f"schedule={schedule!r}: a function from the number of a step to gamma is needed, such as "
            "mfx.schedule.linear(steps=1000)."
        )


@dataclass(frozen=True)
class Annealing:
    """A schedule from one γ to another, which it then keeps.

    In between it gives multiples of 1/1024, simple fractions that fixed point multiplies by with small errors.

    Args:
        steps: number of steps from start to end.
        start: γ at step 0.
        end: γ from step ``steps`` on.
        shape: ``"linear"``, or ``"cosine"``: slow at both ends.
    """

    steps: int
    start: float
    end: float
    shape: Literal["linear", "cosine"]

    def __call__(self, step: int) -> float:
        """Return γ for a step."""
        if step <= 0 or step >= self.steps:
            return self.start if step <= 0 < self.steps else self.end
        done = step / self.steps
        part = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        gamma = round((self.start + part * (self.end - self.start)) * _GRID) / _GRID
        low, high = sorted((self.start, self.end))
        return min(max(gamma, low), high)


def linear(steps: int, start: float = 0.0, end: float = 0.9) -> Annealing:
    """Return a schedule that takes γ from ``start`` to ``end`` evenly.

    Args:
        steps: number of steps from start to end, at least 1.
        start: γ at step 0.
        end: γ from step ``steps`` on.

    Raises:
        MfxError: an argument is out of range.

    >>> schedule = linear(steps=4, end=0.5)
    >>> [schedule(step) for step in range(6)]
    [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    """
    return _annealing(steps, start, end, "linear")


def cosine(steps: int, start: float = 0.0, end: float = 0.9) -> Annealing:
    """Return a schedule that takes γ from ``start`` to ``end`` along half a cosine: slow at both ends.

    Args:
        steps: number of steps from start to end, at least 1.
        start: γ at step 0.
        end: γ from step ``steps`` on.

    Raises:
        MfxError: an argument is out of range.

    >>> schedule = cosine(steps=4, end=0.5)
    >>> [schedule(step) for step in (0, 2, 4, 100)]
    [0.0, 0.25, 0.5, 0.5]
    """
    return _annealing(steps, start, end, "cosine")


def _annealing(steps: int, start: float, end: float, shape: Literal["linear", "cosine"]) -> Annealing:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise MfxError(f"steps={steps!r}: a schedule takes a whole number of steps, at least 1.")
    for gamma in (start, end):
        Gamma.of(gamma)
    return Annealing(steps, float(start), float(end), shape)
