"""Dividing, rounding and multiplying integers; Python's own integers are the oracle."""

from fractions import Fraction

import hypothesis.strategies as st
import torch
from hypothesis import given

from mfx.engine.arithmetic.digit_store import TOP_LIMIT, divide, multiply
from mfx.engine.arithmetic.integers import nearest


@given(st.lists(st.floats(-(2.0**62), 2.0**62), min_size=1, max_size=20))
def test_ties_round_to_even_as_python_does(values):
    expected = [round(Fraction(value)) for value in values]
    given_values = torch.tensor(values, dtype=torch.float64)
    found = nearest(given_values)
    assert found.tolist() == expected
    assert found.data_ptr() == given_values.data_ptr()  # a GPU holds no second copy of a large tensor


def tops(d):
    """The integers that a store may hold before a multiplication."""
    return st.integers(0, (TOP_LIMIT - d) // d)


@given(data=st.data(), d=st.integers(2, 2**14))
def test_multiply_and_divide_follow_their_definition(data, d):
    n = data.draw(st.integers(1, d - 1))
    vs = data.draw(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=9))
    stored = data.draw(st.lists(tops(d), min_size=len(vs), max_size=len(vs)))
    v, top = torch.tensor(vs), torch.tensor(stored)
    multiply(v, top, n, d)
    pushed = [d * t + a % d for a, t in zip(vs, stored, strict=True)]
    assert top.tolist() == [w // n for w in pushed]
    assert v.tolist() == [n * (a // d) + w % n for a, w in zip(vs, pushed, strict=True)]
    divide(v, top, n, d)
    assert v.tolist() == vs
    assert top.tolist() == stored
