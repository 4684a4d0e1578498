"""Values of γ that tests draw."""

import hypothesis.strategies as st

from mfx.options.gamma import Gamma
from tests.mfx.engine.arithmetic.kernels.states import SOME_GAMMAS

GAMMAS = st.sampled_from(SOME_GAMMAS) | st.integers(2, 2**14).flatmap(
    lambda d: st.integers(1, d - 1).map(lambda n: Gamma(n, d))
)
