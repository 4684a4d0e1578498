"""Exact arithmetic as what it is: integers, walked back to the ones they came from."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from mfx.engine.arithmetic import ExactState, FloatState, blocks
from mfx.engine.arithmetic.digit_store import LIMB, TOP_LIMIT, DigitStore, bytes_stored, divide, multiply
from mfx.options.gamma import Gamma

GAMMAS = (
    st.integers(2, 2**14).flatmap(lambda d: st.tuples(st.integers(1, d - 1), st.just(d))).map(lambda nd: Gamma(*nd))
)
SEEDS = st.integers(0, 2**31)


def multiplied(store, v, gamma):
    v = v.clone()
    top = store.before_multiply(gamma.numerator, gamma.denominator, v)
    multiply(v, top, gamma.numerator, gamma.denominator)
    return v


def divided(store, v, gamma):
    v = v.clone()
    divide(v, store.before_divide(), gamma.numerator, gamma.denominator)
    store.after_divide()
    return v


@settings(max_examples=100, deadline=None)
@given(gamma=GAMMAS, depth=st.integers(1, 80), seed=SEEDS)
def test_store_undoes_its_multiplications(gamma, depth, seed):
    torch.manual_seed(seed)
    v = start = torch.randint(-(2**62), 2**62, (50,))
    increments = [torch.randint(-(2**40), 2**40, v.shape) for _ in range(depth)]
    store = DigitStore()
    for increment in increments:
        v = multiplied(store, v, gamma) + increment
    assert not torch.equal(start, v)
    for increment in reversed(increments):
        v = divided(store, v - increment, gamma)
    assert torch.equal(start, v)
    assert store.is_empty()


def walk_there_and_back(x, v, ys, kind, gamma):
    """Asserts that the integers come back; returns the state in between."""
    state = ExactState.start(x, v, reversible=True)
    X, V = state.X.clone(), torch.zeros_like(state.X) if v is None else state.V.clone()
    streams = [state.stream(), *(state.advance(y, kind, gamma) for y in ys)]
    frozen = state.freeze()
    copies = [t.clone() for t in frozen.tensors]
    back = frozen.thaw(frozen.tensors)
    for y, stream in zip(reversed(ys), reversed(streams[:-1]), strict=True):
        assert torch.equal(back.retreat_x(), stream)
        back.retreat_v(y, kind, gamma)
    assert (back.X == X).all()
    assert (back.V == V).all()
    assert back.store.is_empty()
    assert back.is_start()
    assert all(map(torch.equal, frozen.tensors, copies)), "the graph's copy was written into"
    return state


@settings(max_examples=150, deadline=None)
@given(
    gamma=GAMMAS,
    depth=st.integers(1, 60),
    seed=SEEDS,
    kind=st.sampled_from(["residual", "map"]),
    given_v=st.booleans(),
    size=st.sampled_from([1.0, 100.0, 3e4]),
)
def test_state_walks_back_to_the_integers_it_came_from(gamma, depth, seed, kind, given_v, size):
    torch.manual_seed(seed)
    x, v = size * torch.randn(7, 5), 3 * torch.randn(7, 5) if given_v else None
    walk_there_and_back(x, v, [torch.randn(7, 5) for _ in range(depth)], kind, gamma)


def advance_python(X, V, store, F, gamma):
    """One step of one element in Python's integers; a store of any size, without limbs."""
    n, d = gamma.numerator, gamma.denominator
    store, digit = divmod(store * d + V % d, n)
    V = n * (V // d) + digit + F
    return X + V, V, store


@settings(max_examples=50, deadline=None)
@given(gamma=GAMMAS, seed=SEEDS, size=st.sampled_from([1e-6, 1.0, 300.0, 1e5]))
def test_steps_are_those_of_pythons_integers(gamma, seed, size):
    torch.manual_seed(seed)
    x, ys = size * torch.randn(6), [size * torch.randn(6) for _ in range(3)]  # short enough for a store of one word
    state = ExactState.start(x, None, reversible=True)
    fixed = [[round(Fraction(e * 2.0**40)) for e in x.tolist()]]
    fixed += [[round(Fraction(e * (gamma.complement * 2.0**40))) for e in y.tolist()] for y in ys]
    state.advance(ys[0], "residual", gamma)
    elements = [(X + F, F, 0) for X, F in zip(*fixed[:2], strict=True)]
    for y, increments in zip(ys[1:], fixed[2:], strict=True):
        state.advance(y, "residual", gamma)
        elements = [advance_python(*e, F, gamma) for e, F in zip(elements, increments, strict=True)]
    found = zip(*([int(e) for e in t] for t in (state.X, state.V, state.store.top)), strict=True)
    assert list(found) == elements


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided"])
def test_any_layout_in_memory(layout, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", 16)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    given = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2),
        "expanded": x[:1].expand(4, 3, 4, 5),
        "strided": x[:, :, ::2],
    }[layout]
    ys = [torch.randn(given.shape) for _ in range(5)]
    plain = walk_there_and_back(given.contiguous(), torch.ones(given.shape), ys, "map", Gamma(9, 10))
    found = walk_there_and_back(given, torch.ones(given.shape), ys, "map", Gamma(9, 10))
    assert torch.equal(found.X, plain.X)
    assert found.stream().stride() == given.clone().stride()


@pytest.mark.parametrize("gamma", [Gamma(999, 1000), Gamma(9, 10), Gamma(1, 2), Gamma(1, 1000), Gamma(9973, 16381)])
def test_store_takes_little_more_than_the_digits_themselves(gamma):
    ideal = math.log2(gamma.denominator / gamma.numerator)  # bits per step
    steps = math.ceil(160 / ideal)  # the word holds 50 bits
    store, v = DigitStore(), torch.zeros(10, dtype=torch.int64)
    for t in range(steps):
        store.before_multiply(gamma.numerator, gamma.denominator, v)  # what it makes room for depends on no data
        assert 8 * sum(limb.nbytes for limb in store.limbs) <= 1.05 * ideal * (t + 1) * v.numel()
    assert store.limbs
    assert store.top.nbytes == 8 * v.numel()


# --- the width of a frozen store --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(gamma=GAMMAS, depth=st.integers(1, 60))
@example(gamma=Gamma(1, 12174), depth=6)  # d times this bound would not fit into an int64: it is never formed
def test_the_bound_is_the_largest_integer_that_digits_can_make(gamma, depth):
    """The largest digit every time makes the largest top, at v = −1 as at any v with this remainder."""
    n, d = gamma.numerator, gamma.denominator
    store, largest = DigitStore(), 0
    for _ in range(depth):
        v = torch.tensor([d - 1, -1, 0, 12345678901])
        before = store.bound
        multiply(v, store.before_multiply(n, d, v), n, d)
        largest = ((largest >> LIMB if store.history[-1][1] else largest) * d + d - 1) // n
        assert store.top[:2].tolist() == [largest, largest]
        assert store.top.max() == store.bound == largest
        assert largest < TOP_LIMIT  # a limb is filled before a product reaches it, and n is 1 at least
        assert store.history[-1][0] == before


@settings(max_examples=100, deadline=None)
@given(
    gamma=GAMMAS | st.sampled_from([Gamma(9, 10), Gamma(99, 100), Gamma(1, 2)]),
    depth=st.integers(1, 100),
    seed=SEEDS,
    largest=st.booleans(),
)
def test_a_frozen_store_is_narrow_and_loses_nothing(gamma, depth, seed, largest):
    torch.manual_seed(seed)
    n, d = gamma.numerator, gamma.denominator
    values = [torch.full((9,), -1) if largest else torch.randint(-(2**62), 2**62, (9,)) for _ in range(depth)]
    store = DigitStore()
    products = [multiplied(store, v, gamma) for v in values]
    top, bound = store.top.clone(), store.bound
    frozen, thaw = store.freeze()
    itemsize = frozen[-1].dtype.itemsize
    assert bound < 256**itemsize
    assert itemsize == 1 or bound >= 256 ** (itemsize // 2), "it could be narrower"
    assert sum(t.dtype.itemsize for t in frozen) == bytes_stored(n, d, depth)
    copies = [t.clone() for t in frozen]
    assert torch.equal(thaw(frozen).before_divide(), top)
    for _ in range(2):  # a frozen store can be thawed again, and frozen again on the way
        back = thaw(frozen)
        for v, product in zip(reversed(values), reversed(products), strict=True):
            assert torch.equal(divided(back, product, gamma), v)
            frozen_again, thaw_again = back.freeze()
            back = thaw_again(frozen_again)
        assert back.is_empty()
        assert back.bound == 0
    assert all(map(torch.equal, frozen, copies)), "what is frozen was written into"
    multiplied(store, values[0], gamma)  # and the store itself can go on
    assert all(map(torch.equal, frozen, copies))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_eighteen_bytes_at_nine_tenths_and_eighty_steps(dtype):
    gamma, state = Gamma(9, 10), ExactState.start(torch.randn(8).to(dtype), None, reversible=True)
    for steps in range(1, 81):
        state.advance(torch.randn(8).to(dtype), "residual", gamma)
        kept = sum(t.nbytes for t in state.freeze().tensors) / 8
        assert kept == ExactState.bytes_kept(gamma, dtype, steps)
        assert kept <= 18


@pytest.mark.parametrize("dtype, first", [(torch.float64, 4), (torch.float32, 7), (torch.bfloat16, 13)])
def test_what_a_chain_computes_does_not_depend_on_the_width_of_its_store(dtype, first):
    """It walks back where 24 bytes are less than its inputs, as ever."""
    walks = [ExactState.walks_back(Gamma(9, 10), dtype, steps) for steps in range(1, 100)]
    assert walks == [steps >= first for steps in range(1, 100)]


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
    # With g(m) = γ^-m + Σ γ^-i / 16, i < m: the root of Σ g(m)², m ≤ K, may be 6e-6/2^-23 = 50.3. At γ = .9 it is 47.6
    # for K = 25 and 53.1 for K = 26. At γ = .1 it is 10.1 for K = 1 and 101 for K = 2.
    assert FloatState.anchor_every(Gamma(9, 10), torch.float32) == 25
    assert FloatState.anchor_every(Gamma(9, 10), torch.bfloat16) == 25
    assert FloatState.anchor_every(Gamma(1, 10), torch.float32) == 1


def test_empty_tensors():
    state = ExactState.start(torch.zeros(0, 3), None, reversible=True)
    state.advance(torch.zeros(0, 3), "residual", Gamma(1, 2))
    assert state.stream().shape == (0, 3)
