"""Triton kernels of float arithmetic, and of gradients in both; conventions as in `triton_kernels`."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mfx.engine.arithmetic.triton_kernels import elements, is_minus, narrow, scalar

_FLOAT_GAMMA = ["gamma_bits", "rest_bits", "minus_gamma_bits", "minus_bits", "stride", "rows"]
_FACTORS = ["ratio_bits", "minus_ratio_bits", "y_bits", "minus_y_bits", "v_bits", "minus_v_bits", "stride", "rows"]


@triton.jit
def _pick(SIGNS, i, stride, rows, mask, plus_bits, minus_bits, dtype: tl.constexpr):
    """The number that goes with the sign of γ."""
    if SIGNS is None:
        number = scalar(plus_bits, dtype)
    else:
        minus = is_minus(SIGNS, i, stride, rows, mask)
        number = tl.where(minus, scalar(minus_bits, dtype), scalar(plus_bits, dtype))
    return number


@triton.jit
def _f(Y, x, i, mask, MAP: tl.constexpr):
    f = tl.load(Y + i, mask=mask, other=0).to(x.dtype)
    if MAP:
        f = f - x
    return f


@triton.jit(do_not_specialize=_FLOAT_GAMMA)
def float_advance(
    X, V, Y, X_to, V_to, OUT, SIGNS, stride, rows, gamma_bits, rest_bits, minus_gamma_bits, minus_bits, size,
    MAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V ← γ·v + (1−γ)·f, x ← x + v; write x to OUT in the stream's dtype."""
    i, mask = elements(size, BLOCK)
    wide: tl.constexpr = X_to.dtype.element_ty
    x = tl.load(X + i, mask=mask, other=0)
    f = _f(Y, x, i, mask, MAP)
    rest = _pick(SIGNS, i, stride, rows, mask, rest_bits, minus_bits, wide)
    if V is None:
        v = f * rest
    else:
        gamma = _pick(SIGNS, i, stride, rows, mask, gamma_bits, minus_gamma_bits, wide)
        before = tl.load(V + i, mask=mask, other=0) * gamma
        if SIGNS is None:
            v = tl.fma(f, rest, before)
        else:
            v = before + f * rest
    x = x + v
    tl.store(V_to + i, v, mask=mask)
    tl.store(X_to + i, x, mask=mask)
    if OUT is not None:
        tl.store(OUT + i, narrow(x, OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_FLOAT_GAMMA)
def float_retreat(
    X, V, Y, X_to, V_to, OUT, SIGNS, stride, rows, gamma_bits, rest_bits, minus_gamma_bits, minus_bits, size,
    MAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V ← (v − (1−γ)·f) / γ; then, with X_to, x ← x − v, and write it to OUT. Without Y, v stays."""
    i, mask = elements(size, BLOCK)
    wide: tl.constexpr = V.dtype.element_ty
    x = tl.load(X + i, mask=mask, other=0)
    v = tl.load(V + i, mask=mask, other=0)
    if Y is not None:
        f = _f(Y, x, i, mask, MAP)
        rest = _pick(SIGNS, i, stride, rows, mask, rest_bits, minus_bits, wide)
        gamma = _pick(SIGNS, i, stride, rows, mask, gamma_bits, minus_gamma_bits, wide)
        if SIGNS is None:
            v = tl.fma(f, -rest, v)
        else:
            v = v + f * -rest
        if wide == tl.float64:
            v = v / gamma
        else:
            v = tl.div_rn(v, gamma)
        tl.store(V_to + i, v, mask=mask)
    if X_to is not None:
        x = x - v
        tl.store(X_to + i, x, mask=mask)
        if OUT is not None:
            tl.store(OUT + i, narrow(x, OUT.dtype.element_ty), mask=mask)


# --- gradients --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_FACTORS)
def gradients(
    GX, GV, GX_to, GV_to, GY_to, LATER, SIGNS, stride, rows, ratio_bits, minus_ratio_bits, y_bits, minus_y_bits,
    v_bits, minus_v_bits, size, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The backward pass of an update, rounded as torch rounds: g = gx + ratio·gv, and shares of it for y and v.

    Where the value is h(x) = x + f(x), with GX_to, the gradient of x is gx less that of y. LATER are the
    signs that the ratio goes by.
    """
    i, mask = elements(size, BLOCK)
    if GV is not None:
        ratio = _pick(LATER, i, stride, rows, mask, ratio_bits, minus_ratio_bits, WIDE)
    if GX is None:
        g = tl.load(GV + i, mask=mask, other=0) * ratio
    else:
        g = tl.load(GX + i, mask=mask, other=0).to(WIDE)
        if GV is not None:
            if LATER is None:
                g = tl.fma(tl.load(GV + i, mask=mask, other=0), ratio, g)
            else:
                g = g + tl.load(GV + i, mask=mask, other=0) * ratio
    gy = g * _pick(SIGNS, i, stride, rows, mask, y_bits, minus_y_bits, WIDE)
    if GV_to is not None:
        gv = g * _pick(SIGNS, i, stride, rows, mask, v_bits, minus_v_bits, WIDE)
        tl.store(GV_to + i, narrow(gv, GV_to.dtype.element_ty), mask=mask)
    if GY_to is not None:
        gy_rounded = narrow(gy, GY_to.dtype.element_ty)
        tl.store(GY_to + i, gy_rounded, mask=mask)
        gy = gy_rounded.to(WIDE)
    if GX_to is not None:
        if GX is None:
            gx = -gy
        else:
            gx = tl.load(GX + i, mask=mask, other=0).to(WIDE) - gy
        tl.store(GX_to + i, narrow(gx, GX_to.dtype.element_ty), mask=mask)
