"""Both arithmetics by Triton's kernels: one launch per step forward; back, one for the states and one for gradients."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from typing_extensions import Self, override

from mfx.compat import is_batched
from mfx.engine.arithmetic import triton_float_kernels, triton_kernels
from mfx.engine.arithmetic.base import State
from mfx.engine.arithmetic.blocks import is_plain, is_single
from mfx.engine.arithmetic.digit_store import DigitStore, grow, narrowest
from mfx.engine.arithmetic.exact import ExactState
from mfx.engine.arithmetic.floating import FloatState
from mfx.engine.arithmetic.gradients import Gradients, UpdateGradients, gradients_of
from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels
from mfx.engine.arithmetic.range_check import RangeCheck
from mfx.engine.arithmetic.signed import UpdateGamma, carried_by, ratio_of, value_of
from mfx.options.gamma import Gamma

_BLOCK = 512  # elements, two a thread: vectors of 16 bytes of states, and no registers are spilled
# No fusion of products and sums, whose result would not be that of two operations of torch.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def _gradients(update: UpdateGradients, gx: Tensor | None, gv: Tensor | None) -> Gradients:
    """As ``gradients_of``, which it calls where the pass is differentiated or vectorized."""
    given = [g for g in (gx, gv) if g is not None]
    are_single = all(is_single(g) and not is_batched(g) for g in given)
    if torch.is_grad_enabled() or not are_single or update.gamma.is_one:
        return gradients_of(update, gx, gv)
    x_dtype, v_dtype, y_dtype = update.dtypes
    like = torch.empty_like(given[-1], dtype=update.wide)
    shares = update.follows and update.needs_v and v_dtype is y_dtype  # gradients of v and y are one tensor
    gy = like if y_dtype is update.wide else torch.empty_like(like, dtype=y_dtype)
    gv_to = gy if shares else torch.empty_like(like, dtype=v_dtype) if update.needs_v else None
    gx_to = torch.empty_like(like, dtype=x_dtype) if update.kind == "map" else None
    later, own = update.later_gamma, update.gamma
    factors = (later, ratio_of), (own, carried_by), (own, carried_by if update.follows else value_of)
    tensors = *(None if g is None else _alike(g, like) for g in (gx, gv)), gx_to, gv_to, None if shares else gy
    bits = [_bits(update.wide, of(size)) for gamma, of in factors for size in (gamma.magnitude, -gamma.magnitude)]
    signs, stride, rows = own.rows_in(like)
    later_signs, *where = later.rows_in(like)
    if signs is None:  # of the first step, say
        stride, rows = where
    _launch(
        triton_float_kernels.gradients,
        like,
        *tensors,
        later_signs,
        signs,
        stride,
        rows,
        *bits,
        WIDE=_TRITON[update.wide],
    )
    if gx_to is None and gx is not None:
        gx_to = gx if gx.dtype is x_dtype else gx.to(x_dtype)
    return gx_to, gv_to, gy


class TritonExactState(ExactState):
    """`ExactState` with the same integers; elements out of range are marked in X, and ``flags`` tells of them.

    A walk back takes x another step back when it takes v back, so ``X`` is ahead of ``V`` until the next ``retreat_x``.
    The store's top is always narrow.
    """

    gradients = staticmethod(_gradients)
    flags: Tensor  # see `triton_kernels`
    _stream: Tensor | None = None  # the next that ``stream`` or ``retreat_x`` returns, if it is there already

    @classmethod
    @override
    def start(cls, x: Tensor, v: Tensor | None, *, reversible: bool, kernels: Kernels = BLOCK_KERNELS) -> Self:
        X = torch.empty_like(x, dtype=torch.int64)
        V = None if v is None else torch.empty_like(X)
        state = cls(X, V, DigitStore(keep_limbs=reversible), x.dtype, RangeCheck(), kernels)
        state.flags = torch.zeros(2, dtype=torch.int64, device=x.device)
        state._stream = out = state._new_stream()
        v_in = None if v is None else _alike(v.detach(), X)
        _launch(triton_kernels.enter, X, _alike(x.detach(), X), v_in, X, V, out, state.flags)
        state.start_v_sum = None if V is None or not reversible else V.sum()
        return state

    @override
    def stream(self) -> Tensor:
        out, self._stream = self._stream, None
        if out is None:
            out = self._new_stream()
            _launch(triton_kernels.stream, self.X, self.X, out)
        return out

    @override
    def advance(self, y: Tensor, kind: str, gamma: UpdateGamma) -> Tensor:
        self._stream = limb = top = top_to = None
        X, V, out, spills = self.X, self.V, self._new_stream(), False
        X_to = X if self.owns_x else torch.empty_like(X)
        V_to = V if V is not None and self.owns_v else torch.empty_like(X)
        if gamma.is_zero:
            V = None
        if V is not None:
            store, top, bound = self.store, self.store.top, self.store.bound
            store.bound, spills = grow(bound, gamma.numerator, gamma.denominator)
            store.history.append((bound, spills))
            if top is None or not store.owned or store.bound >= 256**top.dtype.itemsize:
                top_to = torch.empty_like(X, dtype=narrowest(store.bound))
            else:
                top_to = top
            if spills and store.keep_limbs:
                store.limbs.append(limb := torch.empty_like(X, dtype=torch.int16))
        tensors = X, V, top, _alike(y, X), X_to, V_to, top_to, limb, out, self.flags, *gamma.rows_in(X)
        _launch(triton_kernels.advance, X, *tensors, *_numbers(gamma.magnitude), MAP=kind == "map", SPILL=spills)
        self._own(X_to, V_to, top_to)
        self.steps += 1
        return out

    @override
    def retreat_x(self) -> Tensor:
        out, self._stream = self._stream, None
        if out is None:
            out = self._new_stream()
            X, V = self.X, self._velocity()
            X_to = X if self.owns_x else torch.empty_like(X)
            tensors = X, V, None, None, X_to, None, None, None, out, *_ANY.rows_in(X)
            _launch(triton_kernels.retreat, X, *tensors, *_numbers(_ANY), MAP=False)
            self.X, self.owns_x = X_to, True
        return out

    @override
    def retreat_v(self, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        self.steps -= 1
        X, V, top, limb, top_to = self.X, self._velocity(), None, None, None
        if not (gamma.is_zero or (self.steps == 0 and self.start_v_sum is None)):
            store, top = self.store, self.store.top
            if store.owned:
                top_to = top
            else:  # wide enough for all that a walk comes by
                largest = max(store.bound, *(bound for bound, _ in store.history))
                top_to = torch.empty_like(X, dtype=narrowest(largest))
            store.bound, spilled = store.history.pop()
            limb = store.limbs.pop() if spilled else None
        out = self._new_stream() if self.steps > self.start_steps else None
        X_to = X if self.owns_x or out is None else torch.empty_like(X)
        V_to = V if self.owns_v else torch.empty_like(V)
        tensors = X, V, top, _alike(y, X), X_to, V_to, top_to, limb, out, *gamma.rows_in(X)
        _launch(triton_kernels.retreat, X, *tensors, *_numbers(gamma.magnitude), MAP=kind == "map")
        self._own(X_to, V_to, top_to)
        self._stream = out

    @override
    def overflowed(self) -> Tensor | None:
        return self.flags.view(torch.float64)[0]

    @override
    def _any_poisoned(self) -> Tensor | None:
        return self.flags[1] != 0

    def _own(self, X: Tensor, V: Tensor, top: Tensor | None) -> None:
        self.X, self.V, self.owns_x, self.owns_v = X, V, True, True
        if top is not None:
            self.store.top, self.store.owned = top, True


class TritonFloatState(FloatState):
    """`FloatState` with the same roundings. A walk back takes x another step back when it takes v back."""

    gradients = staticmethod(_gradients)
    _steps = 0
    _ahead: Tensor | None = None  # the next that ``retreat_x`` returns, if it is there already

    @override
    def advance(self, y: Tensor, kind: str, gamma: UpdateGamma) -> Tensor:
        x_to = torch.empty_like(self.x)
        v = None if self.v is None else _alike(self.v, x_to)
        v_to = v if v is not None and self.owns_v else torch.empty_like(x_to)
        out = self._narrow(x_to)
        tensors = _alike(self.x, x_to), v, _alike(y, x_to), x_to, v_to, out, *gamma.rows_in(x_to)
        _launch(
            triton_float_kernels.float_advance,
            x_to,
            *tensors,
            *_scalars(x_to.dtype, gamma.magnitude),
            MAP=kind == "map",
        )
        self.x, self.v, self.owns_v = x_to, v_to, True
        self._steps += 1
        return x_to if out is None else out

    @override
    def retreat_x(self) -> Tensor:
        ahead, self._ahead = self._ahead, None
        return self._retreat(None, "residual", _ANY, goes_on=True) if ahead is None else ahead

    @override
    def retreat_v(self, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        self._steps -= 1
        self._ahead = self._retreat(y, kind, gamma, goes_on=self._steps > 0)

    def _retreat(self, y: Tensor | None, kind: str, gamma: UpdateGamma, *, goes_on: bool) -> Tensor:
        v = self._velocity()
        x_to = torch.empty_like(v) if goes_on else None
        v_to = v if y is None or self.owns_v else torch.empty_like(v)
        out = None if x_to is None else self._narrow(x_to)
        tensors = _alike(self.x, v), v, None if y is None else _alike(y, v), x_to, v_to, out, *gamma.rows_in(v)
        _launch(triton_float_kernels.float_retreat, v, *tensors, *_scalars(v.dtype, gamma.magnitude), MAP=kind == "map")
        if y is not None:
            self.v, self.owns_v = v_to, True
        if x_to is not None:
            self.x = x_to
        return self.x if out is None else out

    def _narrow(self, x: Tensor) -> Tensor | None:
        return None if x.dtype is self.dtype else torch.empty_like(x, dtype=self.dtype)


_ANY = Gamma(1, 2)  # where γ is not read
_TRITON = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


def _launch(kernel: Any, first: Tensor, *args: Any, **constants: Any) -> None:
    size = first.numel()
    if size == 0 or not is_plain(first):
        return  # a tensor without values: shapes are all there is
    with _current(first.device):
        kernel[(triton.cdiv(size, _BLOCK),)](*args, size, BLOCK=_BLOCK, **constants, **OPTIONS)


def _current(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.index is None else torch.accelerator.device_index(device.index)


def _alike(t: Tensor, first: Tensor) -> Tensor:
    """Return a plain tensor of these values that is laid out in memory as ``first``, which has no holes."""
    if is_single(t) and not t.is_neg() and _strides(t) == _strides(first):
        return t
    return torch.empty_like(first, dtype=t.dtype).copy_(t)


def _strides(t: Tensor) -> Sequence[int]:
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]


@lru_cache(maxsize=64)
def _numbers(gamma: Gamma) -> tuple[int, ...]:
    """Return the arguments of the kernels of exact arithmetic that depend on γ."""
    n, d = gamma.numerator or 1, gamma.denominator
    (Mn, Ln), (Md, Ld) = _magic(n), _magic(d)
    return n, d, Mn, Md, Ln, Ld, *(_bits(torch.float64, size.complement) for size in (gamma, -gamma))


def _magic(d: int) -> tuple[int, int]:
    """Return M and L by which ``triton_kernels`` divides by d."""
    L = (d - 1).bit_length()
    return -(-(1 << (63 + L)) // d), L


@lru_cache(maxsize=64)
def _scalars(dtype: torch.dtype, gamma: Gamma) -> tuple[int, ...]:
    return tuple(_bits(dtype, number) for size in (gamma, -gamma) for number in (size.value, size.complement))


def _bits(dtype: torch.dtype, value: float) -> int:
    """Return the bits of a number that is rounded to float32 or float64."""
    integer, number = ("<q", "<d") if dtype is torch.float64 else ("<i", "<f")
    bits: int = struct.unpack(integer, struct.pack(number, value))[0]
    return bits


STATES: dict[type[State], type[State]] = {ExactState: TritonExactState, FloatState: TritonFloatState}


def try_on(device: torch.device) -> None:
    """Run a kernel on a device; whatever it raises, Triton does not serve there."""
    X = torch.ones(1, dtype=torch.int64, device=device)
    _launch(triton_kernels.stream, X, X, torch.empty_like(X, dtype=torch.float32))
