"""The kernel of an update's backward pass rounds as torch does, bit for bit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mfx.engine.arithmetic.gradients import UpdateGradients, gradients_of
from mfx.engine.arithmetic.triton_states import TritonExactState, TritonFloatState
from mfx.options.gamma import Gamma
from tests.mfx.engine.arithmetic.kernels import cases
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.arithmetic.kernels.states import DTYPES, KINDS, SIZES
from tests.mfx.engine.arithmetic.kernels.strategies import GAMMAS

DEVICE = "cuda" if ON_GPU else "cpu"
compute = TritonExactState.gradients


@st.composite
def dtypes(draw):
    """Of x, v and y: that of y promotes to that of x, v is wide, or of any dtype where the caller gave it."""
    x = draw(st.sampled_from(DTYPES))
    y = draw(st.sampled_from([dtype for dtype in DTYPES if torch.promote_types(dtype, x) is x]))
    wide = torch.float64 if x is torch.float64 else torch.float32
    return (x, draw(st.sampled_from([wide, wide, x, torch.bfloat16])), y), wide


@settings(max_examples=80, deadline=None)
@given(
    types=dtypes(),
    kind=st.sampled_from(KINDS),
    gamma=GAMMAS | st.sampled_from([Gamma(0, 1), Gamma(1, 1)]),
    later=GAMMAS | st.just(Gamma(1, 1)),
    follows=st.booleans(),
    needs_v=st.booleans(),
    which=st.sampled_from(["x", "v", "both"]),
    size=st.sampled_from(SIZES),
    all_bits=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_as_torch_rounds(**choice):
    cases.gradients(DEVICE, **choice)


@pytest.mark.parametrize("which", ["expanded", "transposed", "negative"])
def test_other_layouts(which):
    update = UpdateGradients("map", Gamma(9, 10), Gamma(9, 10), True, (torch.float32,) * 3, torch.float32, True)
    gv = torch.randn(4, 5, device=DEVICE)
    gx = {
        "expanded": torch.ones((), device=DEVICE).expand(4, 5),
        "transposed": torch.randn(5, 4, device=DEVICE).t(),
        "negative": torch.complex(gv, gv).conj().imag,
    }[which]
    with torch.no_grad():
        for given_gradients in ((gx, gv), (gv, gx), (gx, None), (None, gx)):
            assert all(map(torch.equal, compute(update, *given_gradients), gradients_of(update, *given_gradients)))


def test_a_pass_that_is_differentiated_is_made_of_operations(monkeypatch):
    update = UpdateGradients("residual", Gamma(9, 10), Gamma(9, 10), True, (torch.float32,) * 3, torch.float32, True)
    gx = torch.randn(5, device=DEVICE, requires_grad=True)
    _, gv, gy = compute(update, gx, None)
    (second,) = torch.autograd.grad(gy.sum(), gx, retain_graph=True)
    torch.testing.assert_close(second, torch.full_like(gx, 0.1))
    assert gv is gy
    batch = torch.randn(3, 5, device=DEVICE)
    with torch.no_grad():
        vectorized = torch.vmap(lambda g: compute(update, g, None)[2])(batch)
        torch.testing.assert_close(vectorized, batch * 0.1)


def test_both_arithmetics_have_it():
    assert TritonFloatState.gradients is TritonExactState.gradients
