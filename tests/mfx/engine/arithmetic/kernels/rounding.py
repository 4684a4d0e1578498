"""a·b + c, rounded once."""

from contextlib import contextmanager
from fractions import Fraction
from unittest import mock

import numpy as np


@contextmanager
def as_on_a_device():
    """Let the interpreter round a multiply-add once (it rounds twice in Triton 3.8), and be silent about overflows."""
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_fma", create_fma), np.errstate(all="ignore"):
        yield


def fma(a, b, c):
    """Of arrays of float32 or float64 that have or take one shape."""
    a, b, c = np.broadcast_arrays(a, b, c)
    if a.dtype == np.float64:
        flat = [_one(*map(float, abc)) for abc in zip(a.ravel(), b.ravel(), c.ravel(), strict=True)]
        return np.array(flat, dtype=np.float64).reshape(a.shape)
    a, b, c = (t.astype(np.float64) for t in (a, b, c))
    product = a * b  # exact: 48 bits
    total = product + c
    with np.errstate(invalid="ignore"):  # infinities
        back = total - product
        rest = (product - (total - back)) + (c - back)  # what the sum lost, exactly
    bits = total.view(np.int64)
    # Rounded to odd, so that the second rounding, to float32, sees what the first one lost.
    to_odd = np.isfinite(total) & np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
    step = np.where((rest > 0) == (total > 0), 1, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        return (bits + np.where(to_odd, step, 0)).view(np.float64).astype(np.float32)


def _one(a, b, c):
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact) if exact else a * b + c  # with the sign of a zero
    except OverflowError:
        return np.copysign(np.inf, float(exact > 0) - 0.5)
