"""Both ways to keep integers must divide, round and multiply alike; Python's own integers are the oracle."""

from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from mfx.engine.arithmetic.digit_store import divide, multiply
from mfx.engine.arithmetic.integers import SMALL, as_float, floor_divide, nearest

DTYPES = [torch.float64, torch.int64]
small = st.integers(-SMALL + 1, SMALL - 1)
divisors = st.integers(1, 2**14)


def floor_of(values, divisor, dtype):
    a = torch.tensor(values, dtype=dtype)
    found = floor_divide(a, divisor, out=torch.empty_like(a))
    assert found.dtype == dtype
    return [int(q) for q in found.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(values=st.lists(small, min_size=1, max_size=20), divisor=divisors)
def test_small_integers_are_divided_as_python_does(dtype, values, divisor):
    assert floor_of(values, divisor, dtype) == [value // divisor for value in values]


# What float64 could get wrong, in the vectorized part of a kernel (sixteen elements) and in its tail.
@given(small, divisors)
def test_just_below_and_above_a_multiple(value, divisor):
    multiple = value // divisor * divisor
    values = [v for v in (multiple - 1, multiple, multiple + divisor - 1, multiple + divisor) if abs(v) < SMALL]
    values *= 5
    assert floor_of(values, divisor, torch.float64) == [v // divisor for v in values]


@given(divisors)
def test_the_largest_multiples(divisor):
    edge = (SMALL - 1) // divisor * divisor
    values = [edge, edge - 1, -edge, -edge - 1, -edge + 1, 1 - SMALL, SMALL - 1] * 3
    values = [v for v in values if abs(v) < SMALL]
    assert floor_of(values, divisor, torch.float64) == [v // divisor for v in values]


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20), divisors)
def test_large_integers_are_divided_as_python_does(values, divisor):
    assert floor_of(values, divisor, torch.int64) == [value // divisor for value in values]


@given(st.lists(st.floats(-(2.0**51), 2.0**51), min_size=1, max_size=20))
def test_both_round_to_even_as_python_does(values):
    expected = [round(Fraction(value)) for value in values]
    for dtype in DTYPES:
        assert nearest(torch.tensor(values, dtype=torch.float64), dtype).tolist() == expected


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20))
def test_integers_become_floats_in_the_same_bytes(values):
    bytes_ = torch.empty(len(values), dtype=torch.float64)
    a = bytes_.view(torch.int64).copy_(torch.tensor(values))
    assert as_float(a, bytes_).tolist() == [float(value) for value in values]


def test_nothing_is_written_into_the_dividend():
    a, out = torch.tensor([-7, 7]), torch.empty(2, dtype=torch.int64)
    assert floor_divide(a, 2, out=out) is out
    assert out.tolist() == [-4, 3]
    assert a.tolist() == [-7, 7]


def tops(d):
    """What a store may hold when it is to be multiplied."""
    return st.integers(0, (SMALL - d) // d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data(), d=st.integers(2, 2**14))
def test_multiply_and_divide_follow_their_definition(dtype, data, d):
    n = data.draw(st.integers(1, d - 1))
    vs = data.draw(st.lists(small if dtype == torch.float64 else st.integers(-(2**62), 2**62), min_size=1, max_size=9))
    stored = data.draw(st.lists(tops(d), min_size=len(vs), max_size=len(vs)))
    v, top = torch.tensor(vs, dtype=dtype), torch.tensor(stored, dtype=dtype)
    multiply(v, top, n, d, torch.empty_like(v))
    pushed = [d * t + a % d for a, t in zip(vs, stored, strict=True)]
    assert [int(t) for t in top] == [w // n for w in pushed]
    assert [int(a) for a in v] == [n * (a // d) + w % n for a, w in zip(vs, pushed, strict=True)]
    assume(all(abs(int(a)) < SMALL for a in v) or dtype == torch.int64)
    divide(v, top, n, d, torch.empty_like(v))
    assert [int(a) for a in v] == vs
    assert [int(t) for t in top] == stored
