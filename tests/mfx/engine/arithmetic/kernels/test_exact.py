"""The kernels of exact arithmetic give the integers of torch's operations, bit for bit."""

import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mfx.engine.arithmetic import BLOCK_KERNELS, ExactState
from mfx.engine.arithmetic.digit_store import TOP_LIMIT, DigitStore, narrowest
from mfx.engine.arithmetic.range_check import LIMIT, RangeCheck
from mfx.engine.arithmetic.triton_states import TritonExactState
from mfx.options.gamma import Gamma
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.arithmetic.kernels.states import (
    DTYPES,
    GAMMAS,
    KINDS,
    MARK,
    SIZES,
    any_bits,
    same_bits,
    whole,
)

DEVICE = "cuda" if ON_GPU else "cpu"
EXTREMES = [0, 1, -1, 2**40, -(2**40), 2**53 + 1, -(2**53) - 1, 2**60, -(2**60), 9, 10, -9, -10]


def state_at(cls, X, V, top, bound, dtype):
    """A state in the middle of a chain; its store's top is of the width that ``bound`` needs."""
    store = DigitStore()
    store.bound = bound
    if top is not None:
        store.top = (top if cls is ExactState else top.to(narrowest(bound))).to(DEVICE, copy=True)
    X, V = X.to(DEVICE, copy=True), V.to(DEVICE, copy=True)
    state = cls(X, V, store, dtype, RangeCheck(), BLOCK_KERNELS)
    state.range_check._admitted = math.inf
    state.steps, state.flags = 5, torch.zeros(2, dtype=torch.int64, device=DEVICE)
    return state


def integers(size, how):
    if how == "random":
        return torch.randint(-(2**61), 2**61, (size,)), torch.randint(-(2**60), 2**60, (size,))
    X, V = ([random.choice(EXTREMES) + random.randint(-20, 20) for _ in range(size)] for _ in range(2))
    return torch.tensor(X), torch.tensor(V)


def branch_values(size, dtype, how):
    """Numbers within the range: of any bits, or such that their product with 2⁴⁰ is half way between integers."""
    if how == "half way":
        y = ((torch.randint(-(2**20), 2**20, (size,)) + 0.5) / 2.0**40).to(dtype)
    else:
        y = any_bits(size, dtype)
    return torch.where(y.double().abs() < LIMIT / 8, y, torch.zeros_like(y))


def assert_alike(a, b):
    assert torch.equal(a.X, b.X)
    assert torch.equal(a.V, b.V)
    assert (a.store.top is None) == (b.store.top is None)
    if a.store.top is not None:
        assert torch.equal(whole(a.store.top), whole(b.store.top))
        assert b.store.top.dtype.itemsize >= narrowest(b.store.bound).itemsize
    assert a.store.bound == b.store.bound
    assert len(a.store.limbs) == len(b.store.limbs)
    assert all(map(torch.equal, a.store.limbs, b.store.limbs))


@settings(max_examples=80, deadline=None)
@given(
    gamma=GAMMAS,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from(SIZES),
    how=st.sampled_from(["random", "extreme", "half way"]),
    bits=st.integers(0, 50),
    seed=st.integers(0, 2**31),
)
def test_one_step_there_and_back(gamma, dtype, kind, size, how, bits, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    X, V = integers(size, how)
    y = branch_values(size, dtype, how).to(DEVICE)
    bound = min(2**bits - 1, TOP_LIMIT - 1)  # with 2⁵⁰ a limb is filled first
    top = torch.randint(0, bound + 1, (size,)) if bits else None
    one, two = (state_at(cls, X, V, top, bound, dtype) for cls in (ExactState, TritonExactState))
    for state in (one, two):
        state.start_steps = 4  # so that the first is walked back by one launch, and x of a step before it by the same
    assert same_bits(two.advance(y, kind, gamma), one.advance(y, kind, gamma))
    assert_alike(one, two)
    assert same_bits(two.retreat_x(), one.retreat_x())
    assert torch.equal(one.X, two.X)
    one.retreat_v(y, kind, gamma)
    two.retreat_v(y, kind, gamma)
    before = one.retreat_x()
    assert_alike(one, two)
    assert same_bits(two.retreat_x(), before)
    assert torch.equal(two.V.cpu(), V)
    assert top is None or torch.equal(whole(two.store.top).cpu(), top)
    assert torch.equal(two.X.cpu(), X - V)


def chain(size, dtype, depth, scale, bad):
    """A stream and branches' values; some of them not finite or too large."""

    def values(is_bad):
        y = (scale * torch.randn(size)).to(dtype)
        if is_bad:
            for value in (math.nan, math.inf, -math.inf, 5e6, -3e6, 65504.0):
                y = torch.where(torch.rand(size) < 0.02, torch.tensor(value).to(dtype), y)
        return y.to(DEVICE)

    return [values(bad and i in (0, 3, depth // 2)) for i in range(depth + 1)]


@settings(max_examples=25, deadline=None)
@given(
    gamma=GAMMAS,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    size=st.sampled_from(SIZES),
    depth=st.integers(1, 14),
    scale=st.sampled_from([1e-6, 1.0, 3e3, 1e6]),
    bad=st.booleans(),
    given_v=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_whole_chains(gamma, dtype, kind, size, depth, scale, bad, given_v, seed):
    torch.manual_seed(seed)
    x, *ys = chain(size, dtype, depth, scale, bad)
    v = chain(size, torch.float32, 0, scale, bad)[0] if given_v else None
    one, two = (cls.start(x, v, reversible=True) for cls in (ExactState, TritonExactState))
    seen = [[state.stream(), *(state.advance(y, kind, gamma) for y in ys)] for state in (one, two)]
    dead = torch.zeros_like(x, dtype=torch.bool) if one.range_check.poisoned is None else one.range_check.poisoned
    assert all(map(same_bits, *seen))
    assert torch.equal(two.X == MARK, dead)
    largest, said = (0.0 if (found := state.overflowed()) is None else found.item() for state in (one, two))
    assert (said >= LIMIT) == (largest >= LIMIT)
    assert said <= largest  # elements that are out of range once are not watched any more
    assert bool(two.flags[1]) == bool(dead.any())

    kept = [state.freeze() for state in (one, two)]
    assert [t.dtype for t in kept[1].tensors] == [t.dtype for t in kept[0].tensors]
    for a, b in zip(*(frozen.tensors for frozen in kept), strict=True):
        assert torch.equal(a[~dead], b[~dead])
    copies = [t.clone() for t in kept[1].tensors]
    one, two = (frozen.thaw(frozen.tensors) for frozen in kept)
    for y in reversed(ys):
        assert same_bits(two.retreat_x(), one.retreat_x())
        for state in (one, two):
            state.retreat_v(y, kind, gamma)
    for a, b in ((one.X, two.X), (one.V, two.V)):
        assert torch.equal(a[~dead], b[~dead])
    assert torch.equal(two.X == MARK, dead)
    assert two.is_start()
    assert all(map(torch.equal, kept[1].tensors, copies)), "the graph's copy was written into"
    again = kept[1].thaw(kept[1].tensors)  # once more from the same stored state, as with retain_graph
    assert same_bits(again.retreat_x()[~dead], seen[1][-2][~dead])


@pytest.mark.parametrize("gamma, depth", [(Gamma(1, 64), 24), (Gamma(1, 16384), 11), (Gamma(1, 2), 70)])
def test_limbs_are_spilled_and_refilled(gamma, depth):
    torch.manual_seed(0)
    x, *ys = (torch.randn(33, device=DEVICE) for _ in range(depth + 1))
    one, two = (cls.start(x, None, reversible=True) for cls in (ExactState, TritonExactState))
    for y in ys:
        assert torch.equal(one.advance(y, "residual", gamma), two.advance(y, "residual", gamma))
    assert two.store.limbs
    assert_alike(one, two)
    frozen = two.freeze()
    back = frozen.thaw(frozen.tensors)
    for y in reversed(ys):
        back.retreat_x()
        back.retreat_v(y, "residual", gamma)
    assert back.is_start()
    assert not back.store.limbs


def test_the_store_grows_as_it_has_to():
    state = TritonExactState.start(torch.randn(8, device=DEVICE), None, reversible=True)
    widths = []
    for _ in range(91):
        state.advance(torch.randn(8, device=DEVICE), "residual", Gamma(9, 10))
        widths.append(0 if state.store.top is None else state.store.top.itemsize)
    # Bounds pass 2⁸ and 2¹⁶ at the 37th and 89th multiplication; the first step multiplies nothing.
    assert widths == [0, *[1] * 36, *[2] * 52, *[4] * 2]


def test_a_wrong_walk_is_noticed():
    state = TritonExactState.start(torch.randn(5, device=DEVICE), None, reversible=True)
    ys = [torch.randn(5, device=DEVICE) for _ in range(4)]
    for y in ys:
        state.advance(y, "residual", Gamma(9, 10))
    ys[2][3] += 1e-6
    for y in reversed(ys):
        state.retreat_x()
        state.retreat_v(y, "residual", Gamma(9, 10))
    assert not state.is_start()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_value_is_that_of_the_element(kind):
    state = TritonExactState.start(torch.tensor([1.0, 2.0, 4e6, 0.0], device=DEVICE), None, reversible=True)
    assert state.overflowed().item() == 0
    assert state.stream().isnan().tolist() == [False] * 4
    if kind == "residual":
        out = state.advance(torch.tensor([1.0, math.nan, 4e6, 0.0], device=DEVICE), kind, Gamma(1, 2))
        assert state.overflowed().item() == 6e6
        assert out.isnan().tolist() == [False, True, True, False]
    out = state.advance(torch.tensor([1.0, math.inf, 0.0, -2.5e7], device=DEVICE), kind, Gamma(1, 2))
    assert state.overflowed().item() == 2.5e7
    assert out.isnan().tolist() == [False, True, kind == "residual", True]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "strided", "one", "negative", "empty"])
@pytest.mark.parametrize("cls", [ExactState, TritonExactState])
def test_any_layout_in_memory(cls, layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, device=DEVICE)
    given_x = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2),
        "expanded": x[:1].expand(4, 3, 4, 5),
        "strided": x[:, :, ::2],
        "one": x[:1].as_strided((1, 3, 4, 5), (7, 20, 5, 1)),
        "negative": torch.complex(x, x).conj().imag,  # a view that reads with another sign
        "empty": x[:0],
    }[layout]
    ys = [torch.randn(given_x.shape, device=DEVICE), given_x, torch.randn(given_x.shape, device=DEVICE)]
    gamma = Gamma(9, 10)
    plain = ExactState.start(given_x.clone(memory_format=torch.contiguous_format), None, reversible=True)
    state = cls.start(given_x, torch.zeros((), device=DEVICE).expand(given_x.shape), reversible=True)
    for y in ys:
        expected = plain.advance(y.clone(memory_format=torch.contiguous_format), "map", gamma)
        out = state.advance(y, "map", gamma)
        assert torch.equal(out, expected)
        assert out.stride() == given_x.clone().stride()
    for y in reversed(ys):
        assert torch.equal(state.retreat_x(), plain.retreat_x())
        state.retreat_v(y, "map", gamma)
        plain.retreat_v(y, "map", gamma)
    assert torch.equal(state.X, plain.X)


def test_gamma_one_keeps_the_velocity():
    x, v = torch.randn(9, device=DEVICE), torch.randn(9, device=DEVICE)
    one, two = (cls.start(x, v, reversible=True) for cls in (ExactState, TritonExactState))
    for _ in range(3):
        assert torch.equal(
            *(state.advance(torch.ones(9, device=DEVICE), "residual", Gamma(1, 1)) for state in (one, two))
        )
    assert_alike(one, two)
