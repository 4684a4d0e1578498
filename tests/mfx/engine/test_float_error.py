"""Float arithmetic: anchors keep rebuilt states to the stated tolerance, and what is predicted is an upper bound."""

import math

import pytest
import torch

from mfx.engine.arithmetic import FloatState
from mfx.engine.arithmetic.floating import predict
from mfx.engine.arithmetic.lowbits import LowBits
from mfx.gamma import Gamma

TOLERANCE = {torch.float32: 6e-6, torch.float64: 1e-10}
GAMMAS = [1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999]


def driven(x, t):
    """A branch that hands on no error in x: another random value at every step."""
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(t))


def contracting(x, t):
    """A map of Lipschitz constant 1/2."""
    return torch.tanh(x.roll(1) / 2 + t)


def worst_error(branch, kind, depth, dtype, gamma):
    """In states rebuilt from the end, put right at anchors, relative to the largest element; and the anchors."""
    torch.manual_seed(0)
    x, v = torch.randn(100, dtype=dtype), 0.1 * torch.randn(100, dtype=dtype)
    state, every = FloatState.start(x, v, reversible=True), FloatState.anchor_every(gamma, dtype)
    streams, anchors = [x], {}
    for t in range(depth):
        streams.append(state.advance(branch(streams[t], t), kind, gamma))
        if (t + 1) % every == 0 and t + 1 < depth:
            anchors[t + 1] = state.low_bits()
    worst = 0.0
    for t in reversed(range(depth)):
        if t + 1 in anchors:
            state.put_right(anchors[t + 1])
        found = state.retreat_x()
        state.retreat_v(branch(found, t), kind, gamma)
        worst = max(worst, ((found - streams[t]).abs().max() / streams[t].abs().max()).item())
    return worst, len(anchors)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [4, 16, 64, 256, 1000])
@pytest.mark.parametrize("branch, kind", [(driven, "residual"), (contracting, "map")])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_rebuilt_states_are_within_the_tolerance(gamma, branch, kind, depth, dtype):
    fraction = Gamma.of(gamma)
    if FloatState.bytes_kept(fraction, dtype, depth) == math.inf:
        return  # anchors so close that the inputs are kept instead: nothing is rebuilt
    found, anchors = worst_error(branch, kind, depth, dtype, fraction)
    predicted = predict(fraction, dtype, depth)
    assert found <= predicted.error <= TOLERANCE[dtype]
    assert anchors == predicted.anchors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_step_more_would_leave_the_tolerance(dtype, monkeypatch):
    gamma = Gamma(9, 10)
    every = FloatState.anchor_every(gamma, dtype)
    monkeypatch.setattr(FloatState, "anchor_every", staticmethod(lambda *_: every + 1))
    assert predict(gamma, dtype, every + 1).error > TOLERANCE[dtype]
    # And twice as many do: the tolerance is not met by chance.
    monkeypatch.setattr(FloatState, "anchor_every", staticmethod(lambda *_: 2 * every + 12))
    assert worst_error(driven, "residual", 2 * every + 12, dtype, gamma)[0] > TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_half_of_the_bits_and_a_guess_give_the_whole(dtype, spread):
    """Up to one rounding of an element or of the mean, whichever is larger, also among outliers and next to zero."""
    torch.manual_seed(0)
    t = torch.randn(100_000, dtype=dtype) * torch.randn(100_000, dtype=dtype).mul(spread).exp()
    t[:3] = torch.tensor([0.0, -0.0, 1e6])
    low = LowBits.of(t)
    assert low.bits.element_size() * 2 == t.element_size()
    unit = t.abs() + t.abs().mean()
    reach = {torch.float32: 2.0**-9, torch.float64: 2.0**-22}[dtype]
    found = low.nearest_to(t + (torch.rand_like(t) * 2 - 1) * 0.99 * reach * unit)
    # n(t) rounds |t|/s + 1, and so does the way back; s and the product are rounded, too.
    assert ((found - t).abs() / unit).max() <= 2 * torch.finfo(dtype).eps


def test_a_guess_too_far_off_is_made_no_worse_than_twice_as_far_off():
    torch.manual_seed(0)
    t = torch.randn(10_000)
    guess = t + 0.1 * torch.randn(10_000)
    found = LowBits.of(t).nearest_to(guess)
    eps = torch.finfo(torch.float32).eps
    assert ((found - t).abs() <= 2.01 * (guess - t).abs() + 2 * eps * (t.abs() + 1)).all()


def test_what_is_not_finite_stays_where_it_is():
    t = torch.tensor([1.0, torch.inf, -2.0, torch.nan, -torch.inf])
    found = LowBits.of(t).nearest_to(t + 1e-5)
    assert found.isfinite().tolist() == [True, False, True, False, False]
    assert torch.allclose(found, t, rtol=1e-6, equal_nan=True)
    assert LowBits.of(torch.zeros(3)).nearest_to(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
