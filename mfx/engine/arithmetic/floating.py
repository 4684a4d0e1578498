"""Arithmetic "float": x and v in float32 (float64 for float64 streams), walked back by floating-point arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from functools import cache, partial
from itertools import islice, takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, override

from mfx.engine.arithmetic.base import Frozen, State, wide
from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels
from mfx.engine.arithmetic.signed import UpdateGamma, add_scaled, complement_of, multiplier, value_of
from mfx.options.gamma import Gamma

# The relative error in a rebuilt state that the anchors hold it to: for float32, 25 steps at γ = 0.9. What it comes to
# in a parameter's gradient, relative to its norm, depends on the network. In MLPs and transformers of 64 and 128 layers
# it is 2e-6 at worst, as much as float32 itself is off; 7e-5 in a ResNet-152 stage of 35 steps with SiLU (with 32 steps
# between anchors 2e-4, and 1e-4 is what is wanted); with its own ReLU 2e-2, for the error moves single numbers across
# the kink, but float32 itself is off by as much; and 7e-4 in the first layer of a ViT whose class token starts near
# zero, beside which the error is large.
_TOLERANCE = {torch.float32: 6e-6, torch.float64: 1e-10}
_V_TO_X = 1 / 16


class Prediction(NamedTuple):
    """The price of walking a chain back in floating point.

    Attributes:
        anchors: the number of states (x, v) that are kept beside the last one.
        error: of a rebuilt x, relative to the largest element of x.
    """

    anchors: int
    error: float


def predict(gamma: Gamma, dtype: torch.dtype, steps: int) -> Prediction:
    """Return anchors and error of a chain of so many steps on a stream of ``dtype``, walked back with momentum γ.

    A step back divides the errors in v by γ and takes v, with its errors, from x. So after K steps back the rounding of
    m steps ago is γ^(−m) times as large in v, and Σ γ^(−i), i < m, times in x; roundings are independent of each other.
    Where γ has signs, γ is the magnitude a here: the errors of steps have other signs then, but no other size.
    The assumptions: |v| is at most about |x|/16, and a branch does not enlarge the error in x. With signs v is no
    average: of independent f of size 1 it has the size √((1+a²)/(1−a²)), not √((1−a)/(1+a)): √(1+a²)/(1−a) times that.
    """
    every = FloatState.anchor_every(gamma, dtype) or 1
    eps = torch.finfo(wide(dtype)).eps
    errors = islice(_errors(gamma), min(steps, every))
    return Prediction((steps - 1) // every, eps * max(errors))


def _errors(gamma: Gamma) -> Iterator[float]:
    """Yield the error in x after 1, 2, … steps back, in units of the rounding error."""
    growth, in_x, squares = 1.0, 0.0, 0.0
    v_to_x = _V_TO_X * (math.hypot(1.0, gamma.value) / gamma.complement if gamma.has_signs else 1.0)
    while True:
        in_x += growth
        growth /= gamma.value
        squares += (growth + in_x * v_to_x) ** 2
        yield math.sqrt(squares)


@cache
def _steps_within(gamma: Gamma, error: float) -> int:
    return sum(1 for _ in takewhile(lambda e: e <= error, _errors(gamma)))


class FloatState(State):
    """X and v as floating-point tensors.

    For a float32 stream, ``x`` is the stream tensor itself. Steps are out of place on x, in place on a v that is owned.
    """

    name = "float"
    verifiable = False
    needs_float64 = False
    rounds_input = False

    def __init__(self, x: Tensor, v: Tensor | None, dtype: torch.dtype, *, owns_v: bool) -> None:
        self.x, self.v, self.dtype, self.owns_v = x, v, dtype, owns_v

    @classmethod
    @override
    def start(cls, x: Tensor, v: Tensor | None, *, reversible: bool, kernels: Kernels = BLOCK_KERNELS) -> Self:
        dtype = wide(x.dtype)
        x_state, v_state = x.detach().to(dtype), None if v is None else v.detach().to(dtype)
        return cls(x_state, v_state, x.dtype, owns_v=False)

    @staticmethod
    @override
    def anchor_every(gamma: Gamma, dtype: torch.dtype) -> int | None:
        dtype = wide(dtype)
        return _steps_within(gamma, _TOLERANCE[dtype] / torch.finfo(dtype).eps)

    @staticmethod
    @override
    def bytes_counted(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        return FloatState.bytes_kept(gamma, dtype, steps)

    @staticmethod
    @override
    def bytes_kept(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        every = FloatState.anchor_every(gamma, dtype) or 1
        states = 1 + (steps - 1) // every if every >= 3 else math.inf
        return 2 * wide(dtype).itemsize * states

    @override
    def stream(self) -> Tensor:
        return self.x if self.x.dtype is self.dtype else self.x.to(self.dtype)

    @override
    def advance(self, y: Tensor, kind: str, gamma: UpdateGamma) -> Tensor:
        f = torch.sub(y, self.x) if kind == "map" else y
        complement = gamma.factor(complement_of, self.x)
        if self.v is None:
            self.v = f.to(self.x.dtype) * complement
        else:
            value = multiplier(gamma, value_of, self.v)
            v = self.v.mul_(value) if self.owns_v else self.v * value
            self.v = add_scaled(v, f, complement, in_place=True)
        self.owns_v = True
        self.x = self.x + self.v
        return self.stream()

    @override
    def retreat_x(self) -> Tensor:
        self.x = self.x - self._velocity()
        return self.stream()

    @override
    def retreat_v(self, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        f = torch.sub(y, self.x) if kind == "map" else y
        v = self._velocity()
        v = add_scaled(v, f, -gamma.factor(complement_of, v), in_place=self.owns_v)
        self.v, self.owns_v = v.div_(multiplier(gamma, value_of, v)), True

    @override
    def freeze(self) -> Frozen:
        self.owns_v = False
        rest = copy(self)
        del rest.x, rest.v
        return Frozen((self.x, self._velocity()), partial(_thaw, rest))

    def _velocity(self) -> Tensor:
        assert self.v is not None, "before the first step there is nothing to walk back"
        return self.v


def _thaw(rest: FloatState, tensors: tuple[Tensor, ...]) -> FloatState:
    state = copy(rest)
    state.x, state.v = tensors
    return state
