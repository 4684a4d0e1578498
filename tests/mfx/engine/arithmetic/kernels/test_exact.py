"""The kernels of exact arithmetic give the integers of torch's operations, bit for bit."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mfx.engine.arithmetic import ExactState
from mfx.engine.arithmetic.triton_states import TritonExactState
from mfx.options.gamma import Gamma
from tests.mfx.engine.arithmetic.kernels import cases
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.arithmetic.kernels.states import (
    DTYPES,
    KINDS,
    SIZES,
)
from tests.mfx.engine.arithmetic.kernels.strategies import GAMMAS

DEVICE = "cuda" if ON_GPU else "cpu"


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
def test_one_step_there_and_back(**choice):
    cases.one_step(DEVICE, **choice)


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
def test_whole_chains(**choice):
    cases.exact_chain(DEVICE, **choice)


@pytest.mark.parametrize("gamma, depth", [(Gamma(1, 64), 24), (Gamma(1, 16384), 11), (Gamma(1, 2), 70)])
def test_limbs_are_spilled_and_refilled(gamma, depth):
    torch.manual_seed(0)
    x, *ys = (torch.randn(33, device=DEVICE) for _ in range(depth + 1))
    one, two = (cls.start(x, None, reversible=True) for cls in (ExactState, TritonExactState))
    for y in ys:
        assert torch.equal(one.advance(y, "residual", gamma), two.advance(y, "residual", gamma))
    assert two.store.limbs
    cases.assert_alike(one, two)
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
    cases.assert_alike(one, two)
