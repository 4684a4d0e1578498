"""The two ways to divide and to round must give the same integers; Python's own integers are the oracle."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from mfx.engine.arithmetic.integers import SMALL, floor_divide, nearest

small = st.integers(-SMALL + 1, SMALL - 1)
divisors = st.integers(1, 2**14)


@given(st.lists(small, min_size=1, max_size=20), divisors)
def test_small_integers_are_divided_as_python_does(values, divisor):
    found = floor_divide(torch.tensor(values), divisor, small=True)
    assert found.tolist() == [value // divisor for value in values]


@given(small, divisors)
def test_just_below_and_above_a_multiple(value, divisor):
    multiple = value // divisor * divisor
    values = [v for v in (multiple - 1, multiple, multiple + 1) if abs(v) < SMALL]
    found = floor_divide(torch.tensor(values), divisor, small=True)
    assert found.tolist() == [v // divisor for v in values]


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20), divisors)
def test_large_integers_are_divided_as_python_does(values, divisor):
    found = floor_divide(torch.tensor(values), divisor, small=False)
    assert found.tolist() == [value // divisor for value in values]


@given(st.lists(st.floats(-float(SMALL), float(SMALL), exclude_min=True, exclude_max=True), min_size=1, max_size=20))
def test_both_ways_round_to_even_as_python_does(values):
    expected = [round(Fraction(value)) for value in values]
    for way in (True, False):
        assert nearest(torch.tensor(values, dtype=torch.float64), small=way).tolist() == expected


def test_nothing_is_written_into_the_dividend():
    a, out = torch.tensor([-7, 7]), torch.empty(2, dtype=torch.int64)
    assert floor_divide(a, 2, small=True, out=out) is not a
    assert out.tolist() == [-4, 3]
    assert a.tolist() == [-7, 7]
