"""The elementwise work of a chain as Triton kernels: one launch per step forward, two per step back.

The integers are those of torch's operations (``digit_store``, ``kernels``), bit for bit. What is out of range costs no
mask: X = −2⁶³ marks an element that reads as NaN from then on, and two numbers of each chain, ``FLAGS``, say what
happened: the bits of the largest finite magnitude that was too large, as float64, and 1 if any element is marked.

γ's numbers are arguments like the tensors, so a schedule of γ compiles nothing. Where γ has signs, ``SIGNS`` are the
draws, one or one for each row of a dimension of so many ``rows``, ``stride`` elements apart; 0 is −, for which numbers
called ``minus`` are. A tensor that a step does not have is None. All others are laid out in memory alike, without
holes.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from mfx.compat.triton import is_interpreted

INTERPRETED = tl.constexpr(is_interpreted())
MARK = tl.constexpr(-(2**63))
ONE = tl.constexpr(2.0**40)
UNIT = tl.constexpr(2.0**-40)

_GAMMA = ["n", "d", "Mn", "Md", "Ln", "Ld", "rest_bits", "minus_bits", "stride", "rows"]


@triton.jit
def elements(size, BLOCK: tl.constexpr):
    """The numbers of this program's elements, which may lie beyond 2³¹, and a mask of those that there are."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < size


@triton.jit
def scalar(bits, dtype: tl.constexpr):
    """A number of that dtype from its bits: Triton passes Python's floats as float32."""
    if dtype == tl.float64:
        number = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        number = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return number


# --- integers ---------------------------------------------------------------------------------------------------------


@triton.jit
def _floor_divide(v, M, L):
    """⌊v/d⌋ for every int64 v and 1 ≤ d ≤ 2¹⁴, where M = ⌈2⁶³⁺ᴸ/d⌉ and 2ᴸ⁻¹ < d ≤ 2ᴸ.

    With s the sign, w = v xor s is v or −v − 1, so w < 2⁶³ and ⌊v/d⌋ = ⌊w/d⌋ xor s. M·d = 2⁶³⁺ᴸ + e with
    0 ≤ e < d ≤ 2ᴸ, so w·M/2⁶³⁺ᴸ = w/d + w·e/(d·2⁶³⁺ᴸ) < w/d + 1/d: no integer lies between, the floor is the same.
    """
    s = v >> 63
    w = (v ^ s).to(tl.uint64, bitcast=True)
    q = tl.umulhi(w << 1, M) >> L.to(tl.uint64)
    return q.to(tl.int64, bitcast=True) ^ s


@triton.jit
def _multiply(v, top, n, d, Mn, Ln, Md, Ld):
    """V·n/d and the top after that, as ``digit_store.multiply``; with n and d exchanged it is undone."""
    q = _floor_divide(v, Md, Ld)
    w = v + (top - q) * d
    t = _floor_divide(w, Mn, Ln)
    return w + (q - t) * n, t


@triton.jit
def _nearest(t):
    """The integers nearest to float64 ``t``, ties to even: a sum with 2⁵² has no bits for fractions."""
    size = tl.abs(t)
    whole = tl.where(size < 4503599627370496.0, (size + 4503599627370496.0) - 4503599627370496.0, size)
    return tl.where(t < 0, -whole, whole).to(tl.int64)


@triton.jit
def _increment(y, x, rest, MAP: tl.constexpr):
    """(1−γ)·f as integers, as ``kernels.increment``; ``rest`` is 1 − γ."""
    y = y.to(tl.float64)
    if MAP:
        F = _nearest(y * ONE) - x
        product = F.to(tl.float64) * rest
    else:
        product = y * (rest * ONE)
    return _nearest(product)


@triton.jit
def is_minus(SIGNS, i, stride, rows, mask):
    """True where γ is negative. In memory without holes, the coordinate of element i in a dimension is this."""
    return tl.load(SIGNS + (i // stride) % rows, mask=mask, other=1) == 0


@triton.jit
def _rest(SIGNS, i, stride, rows, mask, rest_bits, minus_bits):
    """1 − γ, one number or one for each element."""
    if SIGNS is None:
        rest = scalar(rest_bits, tl.float64)
    else:
        minus = is_minus(SIGNS, i, stride, rows, mask)
        rest = tl.where(minus, scalar(minus_bits, tl.float64), scalar(rest_bits, tl.float64))
    return rest


# --- the top of the store, in as few bytes as it needs ----------------------------------------------------------------


@triton.jit
def _load_top(T, i, mask):
    top = tl.load(T + i, mask=mask, other=0).to(tl.int64)
    if T.dtype.element_ty == tl.int16:
        top = top & 0xFFFF
    if T.dtype.element_ty == tl.int32:
        top = top & 0xFFFFFFFF
    return top


# --- range ------------------------------------------------------------------------------------------------------------


@triton.jit
def _is_bad(y):
    """Not |y| < 2²², NaN included, by the bits."""
    if y.dtype == tl.float64:
        bad = (y.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF) >= 0x4150000000000000
    else:
        bad = (y.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x4A800000
    return bad


@triton.jit
def _is_out(x):
    """|x| ≥ 2⁶²: the two highest bits differ, or it is −2⁶² itself."""
    return ((x ^ (x << 1)) < 0) | (x == -4611686018427387904)


@triton.jit
def _finite_size(y, bad):
    size = tl.abs(y.to(tl.float64))
    return tl.where(bad & (size < float("inf")), size, 0.0)


@triton.jit
def _note(FLAGS, size):
    """Raise the flags: some element is marked, and ``size`` are the magnitudes of those that were too large."""
    tl.atomic_max(FLAGS, tl.max(size, 0).to(tl.int64, bitcast=True))
    tl.atomic_max(FLAGS + 1, 1)


@triton.jit
def _value(x, dtype: tl.constexpr):
    """The value of integers, NaN where marked."""
    value = tl.where(x == MARK, float("nan"), x.to(tl.float64) * UNIT)
    return narrow(value, dtype)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """A float rounded to ``dtype``; from float64 to narrow ones by way of float32, as torch does."""
    if value.dtype == tl.float64 and dtype != tl.float64:
        value = value.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off (Triton 3.8)
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(value != value, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


# --- exact arithmetic -------------------------------------------------------------------------------------------------


@triton.jit
def enter(x_in, v_in, X, V, OUT, FLAGS, size, BLOCK: tl.constexpr):
    """X, V ← the integers nearest to 2⁴⁰·x, 2⁴⁰·v; write the value of X to OUT."""
    i, mask = elements(size, BLOCK)
    x = tl.load(x_in + i, mask=mask, other=0)
    bad = _is_bad(x)
    dead, largest = bad, _finite_size(x, bad)
    if V is not None:
        v = tl.load(v_in + i, mask=mask, other=0)
        bad_v = _is_bad(v)
        dead, largest = dead | bad_v, tl.maximum(largest, _finite_size(v, bad_v))
        tl.store(V + i, _nearest(tl.where(bad_v, 0.0, v).to(tl.float64) * ONE), mask=mask)
    fixed = tl.where(dead, MARK, _nearest(tl.where(bad, 0.0, x).to(tl.float64) * ONE))
    if tl.max(dead.to(tl.int32), 0) != 0:
        _note(FLAGS, largest)
    tl.store(X + i, fixed, mask=mask)
    tl.store(OUT + i, _value(fixed, OUT.dtype.element_ty), mask=mask)


@triton.jit
def stream(X, OUT, size, BLOCK: tl.constexpr):
    """Write the value of X to OUT."""
    i, mask = elements(size, BLOCK)
    tl.store(OUT + i, _value(tl.load(X + i, mask=mask, other=0), OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_GAMMA)
def advance(
    X, V, T, Y, X_to, V_to, T_to, LIMB, OUT, FLAGS, SIGNS, stride, rows,
    n, d, Mn, Md, Ln, Ld, rest_bits, minus_bits, size, MAP: tl.constexpr, SPILL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V ← γ·V + (1−γ)·f, X ← X + V; write the value of X to OUT.

    Without V it is (1−γ)·f. Without T the store is empty; to SPILL, its low 16 bits go to LIMB first.
    """
    i, mask = elements(size, BLOCK)
    x = tl.load(X + i, mask=mask, other=0)
    y = tl.load(Y + i, mask=mask, other=0)
    bad = _is_bad(y)
    marked = x == MARK
    rest = _rest(SIGNS, i, stride, rows, mask, rest_bits, minus_bits)
    v = _increment(tl.where(bad, 0.0, y), tl.where(marked, 0, x), rest, MAP)
    if V is not None:
        before = tl.load(V + i, mask=mask, other=0)
        if T is None:
            top = tl.zeros([BLOCK], tl.int64)
        else:
            top = _load_top(T, i, mask)
        if SPILL:
            if LIMB is not None:
                tl.store(LIMB + i, top.to(tl.int16), mask=mask)
            top = top >> 16
        scaled, top = _multiply(before, top, n, d, Mn, Ln, Md, Ld)
        tl.store(T_to + i, top.to(T_to.dtype.element_ty), mask=mask)
        if SIGNS is not None:
            scaled = tl.where(is_minus(SIGNS, i, stride, rows, mask), -scaled, scaled)
        v = scaled + v
    x = x + v
    left = _is_out(x) & (marked == 0)
    far = tl.where(left, tl.abs(x.to(tl.float64)) * UNIT, 0.0)
    if SIGNS is not None:  # v is no average
        left_v = _is_out(v) & (marked == 0)
        far = tl.maximum(far, tl.where(left_v, tl.abs(v.to(tl.float64)) * UNIT, 0.0))
        left = left | left_v
    if tl.max((bad | left).to(tl.int32), 0) != 0:  # as good as never, and for a block as a whole
        _note(FLAGS, tl.maximum(_finite_size(y, bad), far))
    x = tl.where(bad | left | marked, MARK, x)
    tl.store(X_to + i, x, mask=mask)
    tl.store(V_to + i, v, mask=mask)
    tl.store(OUT + i, _value(x, OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_GAMMA)
def retreat(
    X, V, T, Y, X_to, V_to, T_to, LIMB, OUT, SIGNS, stride, rows,
    n, d, Mn, Md, Ln, Ld, rest_bits, minus_bits, size, MAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V ← (V − (1−γ)·f) / γ, refilled from LIMB; then, with OUT, X ← X − V, and write its value to OUT.

    Without Y, V stays. Without T, nothing is divided.
    """
    i, mask = elements(size, BLOCK)
    x = tl.load(X + i, mask=mask, other=0)
    v = tl.load(V + i, mask=mask, other=0)
    marked = x == MARK
    if Y is not None:
        y = tl.where(marked, 0.0, tl.load(Y + i, mask=mask, other=0))
        v = v - _increment(y, tl.where(marked, 0, x), _rest(SIGNS, i, stride, rows, mask, rest_bits, minus_bits), MAP)
        if T is not None:
            if SIGNS is not None:
                v = tl.where(is_minus(SIGNS, i, stride, rows, mask), -v, v)
            v, top = _multiply(v, _load_top(T, i, mask), d, n, Md, Ld, Mn, Ln)
            if LIMB is not None:
                top = (top << 16) + (tl.load(LIMB + i, mask=mask, other=0).to(tl.int64) & 0xFFFF)
            tl.store(T_to + i, top.to(T_to.dtype.element_ty), mask=mask)
        tl.store(V_to + i, v, mask=mask)
    if OUT is not None:
        x = tl.where(marked, MARK, x - v)
        tl.store(X_to + i, x, mask=mask)
        tl.store(OUT + i, _value(x, OUT.dtype.element_ty), mask=mask)
