"""γ as a fraction."""

from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mfx.options.gamma import Gamma
from mfx_passes.errors import MfxError


@pytest.mark.parametrize(
    "value, fraction",
    [
        (0.9, (9, 10)),
        (0.5, (1, 2)),
        (0.99, (99, 100)),
        (0, (0, 1)),
        (1 / 3, (1, 3)),
        (0.875, (7, 8)),
        (1 / 64, (1, 64)),
        (0.9999, (9999, 10000)),
    ],
)
def test_simple_fractions(value, fraction):
    gamma = Gamma.of(value)
    assert (gamma.numerator, gamma.denominator) == fraction
    assert gamma.is_zero == (value == 0)
    assert gamma.value == pytest.approx(value)
    assert gamma.complement == pytest.approx(1 - value)


@settings(deadline=None)
@given(st.floats(1e-4, 1 - 1e-4))
def test_near_and_simplest(value):
    gamma = Gamma.of(value)
    error = abs(Fraction(value) - Fraction(gamma.numerator, gamma.denominator))
    # Beside a simple fraction p/q no other has a denominator below 2^14 nearer than 1/(q·2^14).
    assert error <= Fraction(1, 2**15)
    assert gamma.denominator <= 2**14
    assert Gamma.of(gamma.value) == gamma
    if gamma.value != value and error <= Fraction(1, 10**6):
        simpler = (Fraction(round(Fraction(value) * d), d) for d in range(1, gamma.denominator))
        assert all(abs(f - Fraction(value)) > Fraction(1, 10**6) for f in simpler)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), float("inf"), "0.9", None, True, 1j])
def test_not_in_range(value):
    with pytest.raises(MfxError, match="gamma must be a real number with 0 <= gamma < 1"):
        Gamma.of(value)


@pytest.mark.parametrize(
    "value, nearest", [(1e-7, "1/16384"), (1e-5, "1/16384"), (1 - 1e-7, "16383/16384"), (1 - 1e-5, "16383/16384")]
)
def test_too_close_to_zero_or_one(value, nearest):
    with pytest.raises(MfxError, match=f"nearest gamma that works is {nearest}"):
        Gamma.of(value)
