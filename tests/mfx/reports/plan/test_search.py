"""The largest number that fits, in few trials."""

import math

from hypothesis import given
from hypothesis import strategies as st

from mfx.reports.plan.search import MOST, largest

NUMBERS = st.integers(0, 10**4)


@given(
    start=NUMBERS,
    slope=st.integers(1, 50),
    square=st.integers(0, 3),
    limit=st.integers(0, 10**6),
    ends=st.integers(1, 400) | st.just(MOST),
    known=st.integers(1, 300),
    step=st.sampled_from([1, 3, 64]),
)
def test_it_is_the_largest(start, slope, square, limit, ends, known, step):
    def bytes_at(number):
        return math.inf if number > ends else start + slope * number + square * number**2

    found = largest(bytes_at, limit, known, step=step)
    assert found % step == 0 or found == known
    assert found == 0 or bytes_at(found) <= limit
    assert bytes_at((found // step + 1) * step) > limit
    assert found >= known or bytes_at(known) > limit


@given(start=NUMBERS, slope=st.integers(1, 50), most=st.integers(8, 10**5), known=st.integers(1, 300))
def test_on_a_line_few_trials_are_needed(start, slope, most, known):
    tried = []

    def bytes_at(number):
        tried.append(number)
        return start + slope * number

    assert largest(bytes_at, start + slope * most, known) == most
    # One to begin with, one for the line, what the line says and the next; and one more where the first did not fit.
    assert len(tried) == len(set(tried)) <= 5


def test_what_takes_nothing_has_no_end():
    assert largest(lambda number: 0.0, 0, 5) == MOST
