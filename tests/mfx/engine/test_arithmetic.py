"""Exact arithmetic as what it is: integers, walked back to the ones they came from."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mfx.engine.arithmetic import ExactState, FloatState
from mfx.engine.arithmetic.store import DigitStore
from mfx.gamma import Gamma

GAMMAS = (
    st.integers(2, 2**14).flatmap(lambda d: st.tuples(st.integers(1, d - 1), st.just(d))).map(lambda nd: Gamma(*nd))
)
SEEDS = st.integers(0, 2**31)


@settings(max_examples=150, deadline=None)
@given(gamma=GAMMAS, depth=st.integers(1, 80), seed=SEEDS)
def test_store_undoes_its_multiplications(gamma, depth, seed):
    torch.manual_seed(seed)
    v = start = torch.randint(-(2**62), 2**62, (50,))
    increments = [torch.randint(-(2**40), 2**40, v.shape) for _ in range(depth)]
    store = DigitStore()
    for increment in increments:
        v = store.multiply(v.clone(), gamma.numerator, gamma.denominator) + increment
    assert not torch.equal(start, v)
    for increment in reversed(increments):
        v = store.divide(v - increment, gamma.numerator, gamma.denominator)
    assert torch.equal(start, v)
    assert store.is_empty()


@settings(max_examples=150, deadline=None)
@given(
    gamma=GAMMAS, depth=st.integers(1, 60), seed=SEEDS, kind=st.sampled_from(["residual", "map"]), given_v=st.booleans()
)
def test_state_walks_back_to_the_integers_it_came_from(gamma, depth, seed, kind, given_v):
    torch.manual_seed(seed)
    x, v = 100 * torch.randn(7, 5), 3 * torch.randn(7, 5) if given_v else None
    state = ExactState.start(x, v, reversible=True)
    X, V = state.X.clone(), None if v is None else state.V.clone()
    ys = [torch.randn(7, 5) for _ in range(depth)]
    for y in ys:
        state.advance(y, kind, gamma)
    frozen = state.freeze()
    copies = [t.clone() for t in frozen.tensors]
    back = frozen.thaw(frozen.tensors)
    for y in reversed(ys):
        back.retreat_x()
        back.retreat_v(y, kind, gamma)
    assert torch.equal(back.X, X)
    assert torch.equal(back.V, torch.zeros_like(X) if V is None else V)
    assert back.store.is_empty()
    assert back.is_start()
    assert all(map(torch.equal, frozen.tensors, copies)), "the graph's copy was written into"


@pytest.mark.parametrize("gamma", [Gamma(9, 10), Gamma(1, 2), Gamma(1, 100), Gamma(99, 100), Gamma(9973, 16381)])
def test_store_takes_little_more_than_the_digits_themselves(gamma):
    steps = 2000
    store, v = DigitStore(), torch.zeros(1, dtype=torch.int64)
    for _ in range(steps):
        v = store.multiply(v, gamma.numerator, gamma.denominator)
    ideal = steps * torch.log2(torch.tensor(gamma.denominator / gamma.numerator)).item()
    # A bound of b bits is kept to within one part in 2^(31 - 14): the limbs waste less than 2 %; the top may hold 63.
    assert 32 * len(store.limbs) <= 1.02 * ideal


def test_a_wrong_walk_is_noticed():
    state = ExactState.start(torch.randn(5), None, reversible=True)
    ys = [torch.randn(5) for _ in range(4)]
    for y in ys:
        state.advance(y, "residual", Gamma(9, 10))
    ys[2][3] += 1e-6
    for y in reversed(ys):
        state.retreat_x()
        state.retreat_v(y, "residual", Gamma(9, 10))
    assert not state.is_start()


def test_range_is_noticed_wherever_it_is_left():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert ExactState.start(torch.tensor([5e6], dtype=dtype), None, reversible=True).overflowed()
    state = ExactState.start(torch.tensor([4e6, 0.0]), None, reversible=True)
    assert state.overflowed() is None
    state.advance(torch.tensor([4e6, 0.0]), "residual", Gamma(1, 2))
    assert state.overflowed()
    assert state.stream().isnan().tolist() == [True, False]


def test_float_anchors():
    # eps·γ^-K = 2e-6: float32 reaches it after ln(2e-6/2^-23)/ln(1/.9) = 26.8 steps at γ = .9, 1.2 at γ = .1.
    assert FloatState.anchor_every(Gamma(9, 10), torch.float32) == 26
    assert FloatState.anchor_every(Gamma(9, 10), torch.bfloat16) == 26
    assert FloatState.anchor_every(Gamma(1, 10), torch.float32) == 1


def test_empty_tensors():
    state = ExactState.start(torch.zeros(0, 3), None, reversible=True)
    state.advance(torch.zeros(0, 3), "residual", Gamma(1, 2))
    assert state.stream().shape == (0, 3)
