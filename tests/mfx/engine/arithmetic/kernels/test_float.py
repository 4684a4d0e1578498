"""The kernels of float arithmetic round as torch's operations do."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mfx.engine.arithmetic import FloatState
from mfx.engine.arithmetic.triton_states import TritonFloatState
from mfx.options.gamma import Gamma
from tests.mfx.engine.arithmetic.kernels import cases
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.arithmetic.kernels.states import DTYPES, KINDS, SIZES
from tests.mfx.engine.arithmetic.kernels.strategies import GAMMAS

GAMMA = Gamma(9, 10)
DEVICE = "cuda" if ON_GPU else "cpu"


@settings(max_examples=40, deadline=None)
@given(
    gamma=GAMMAS.filter(lambda gamma: gamma.value > 0.05),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from(SIZES),
    depth=st.integers(1, 6),
    given_v=st.booleans(),
    bad=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_whole_chains(**choice):
    cases.float_chain(DEVICE, **choice)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_layouts(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5).to(dtype).to(DEVICE)
    ys = [torch.randn(4, 3, 4, 5).to(dtype).to(DEVICE).to(memory_format=torch.channels_last) for _ in range(3)]
    streams = []
    for cls in (FloatState, TritonFloatState):
        state = cls.start(x[:1].expand(4, 3, 4, 5), torch.zeros((), device=DEVICE).expand(ys[0].shape), reversible=True)
        streams.append([state.advance(y, "map", GAMMA) for y in ys])
        for y in reversed(ys):
            streams[-1].append(state.retreat_x())
            state.retreat_v(y, "map", GAMMA)
    for a, b in zip(*streams, strict=True):
        cases.assert_close(a, b)
