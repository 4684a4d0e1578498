"""The kernels of float arithmetic round as torch's operations do."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mfx.engine.arithmetic import FloatState
from mfx.engine.arithmetic.triton_states import TritonFloatState
from mfx.options.gamma import Gamma
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.arithmetic.kernels.states import DTYPES, GAMMAS, KINDS, SIZES, same_bits

GAMMA = Gamma(9, 10)
DEVICE = "cuda" if ON_GPU else "cpu"


def assert_alike(a, b):
    """Bit for bit; on a GPU torch multiplies by the rounded 1/γ, which is half a unit off, and walks carry that on."""
    if ON_GPU:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    else:
        assert same_bits(a, b)


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
def test_whole_chains(gamma, dtype, kind, size, depth, given_v, bad, seed):
    torch.manual_seed(seed)
    x, *ys = (torch.randn(size).to(dtype).to(DEVICE) for _ in range(depth + 1))
    if bad:
        ys[0][0], ys[-1][-1] = math.nan, math.inf
    v = torch.randn(size, device=DEVICE, dtype=torch.bfloat16) if given_v else None
    states = one, two = [cls.start(x, v, reversible=True) for cls in (FloatState, TritonFloatState)]
    for y in ys:
        assert same_bits(two.advance(y, kind, gamma), one.advance(y, kind, gamma))
        assert same_bits(one.v, two.v)
    kept = [state.freeze() for state in states]
    copies = [t.clone() for t in kept[1].tensors]
    one, two = (frozen.thaw(frozen.tensors) for frozen in kept)
    for y in reversed(ys):
        assert_alike(two.retreat_x(), one.retreat_x())
        one.retreat_v(y, kind, gamma)
        two.retreat_v(y, kind, gamma)
        assert_alike(two.v, one.v)
    assert_alike(two.x, one.x)
    assert all(map(same_bits, kept[1].tensors, copies)), "the graph's copy was written into"


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
        assert_alike(a, b)
