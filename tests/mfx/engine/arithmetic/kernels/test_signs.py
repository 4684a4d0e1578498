"""γ with signs, read from device memory by row of a dimension: the kernels compute what torch's operations do."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mfx.engine.arithmetic import ExactState, FloatState
from mfx.engine.arithmetic.gradients import UpdateGradients, gradients_of
from mfx.engine.arithmetic.signed import Signed
from mfx.options.gamma import Gamma
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.arithmetic.kernels.states import DTYPES, KINDS, TRITON, same_bits
from tests.mfx.engine.arithmetic.kernels.strategies import GAMMAS

DEVICE = "cuda" if ON_GPU else "cpu"
LAYOUTS = [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)]  # of the dimensions in memory, the slowest first


def laid_out(shape, order, dtype):
    t = torch.randn([shape[d] for d in order]).to(dtype).to(DEVICE)
    return t.permute([order.index(d) for d in range(len(shape))])


@st.composite
def signs(draw, shape):
    """γ of one update: one sign, or one for each row of any dimension."""
    gamma, dim = draw(GAMMAS.filter(lambda gamma: gamma.value > 0.05)), draw(st.sampled_from([None, 0, 1, 2]))
    rows = () if dim is None else (shape[dim],)
    return Signed(gamma, torch.randint(0, 2, rows, device=DEVICE), dim or 0)


@pytest.mark.parametrize("arithmetic", [ExactState, FloatState])
@settings(max_examples=8, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), order=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**31))
def test_there_and_back(arithmetic, data, dtype, order, seed):
    torch.manual_seed(seed)
    shape = data.draw(st.sampled_from([(3, 5, 40), (2, 1, 3), (1, 7, 100)]))
    kind, depth = data.draw(st.sampled_from(KINDS)), 5
    x, *ys = (laid_out(shape, order, dtype) for _ in range(depth + 1))
    gammas = [Gamma(0, 1), *(data.draw(signs(shape)) for _ in range(depth - 1))]
    if kind == "map":
        ys = [0.1 * y for y in ys]
    one, two = states = [cls.start(x, None, reversible=True) for cls in (arithmetic, TRITON[arithmetic])]
    streams = [
        [state.stream(), *(state.advance(y, kind, g) for y, g in zip(ys, gammas, strict=True))] for state in states
    ]
    assert all(map(same_bits, *streams))
    one, two = (frozen.thaw(frozen.tensors) for frozen in (state.freeze() for state in states))
    for t in reversed(range(1, depth)):
        before = one.retreat_x(), two.retreat_x()
        if arithmetic is ExactState:
            assert all(same_bits(x, streams[0][t]) for x in before)
        elif not ON_GPU:
            assert same_bits(*before)
        one.retreat_v(ys[t], kind, gammas[t])
        two.retreat_v(ys[t], kind, gammas[t])


@settings(max_examples=10, deadline=None)
@given(data=st.data(), order=st.sampled_from(LAYOUTS), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_gradients(data, order, kind, seed):
    torch.manual_seed(seed)
    shape, dtype = (3, 5, 40), data.draw(st.sampled_from(DTYPES))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    own, later = data.draw(signs(shape)), data.draw(GAMMAS)
    later = Signed(later, torch.randint(0, 2, own.draws.shape, device=DEVICE), own.dim)  # a chain draws in one way
    follows = data.draw(st.booleans())
    gamma = own if follows else Gamma(0, 1)
    update = UpdateGradients(kind, gamma, later, follows, (dtype, wide, dtype), wide, follows)
    gx, gv = laid_out(shape, order, dtype), laid_out(shape, order, wide)
    with torch.no_grad():
        found = TRITON[ExactState].gradients(update, gx, gv)
    for a, b in zip(found, gradients_of(update, gx, gv), strict=True):
        assert (a is None) == (b is None)
        assert a is None or same_bits(a, b)


@pytest.mark.parametrize("state", [ExactState, TRITON[ExactState]])
def test_a_velocity_out_of_range_is_noticed(state):
    # |v| ≤ (1+a)/(1−a)·max|f| may be more than fits, though x and f fit.
    gamma = Signed(Gamma(9, 10), torch.tensor(0, device=DEVICE), 0)
    state = state.start(torch.tensor([0.0, -3.9e6], device=DEVICE), None, reversible=True)
    f = torch.tensor([1.0, 4e6], device=DEVICE)
    state.advance(f, "residual", Gamma(0, 1))
    out = state.advance(-f, "residual", gamma)  # v = −0.9·4e6 − 1.9·4e6
    assert not out[0].isnan()
    assert out[1].isnan()
    assert state.overflowed() >= 2**22
