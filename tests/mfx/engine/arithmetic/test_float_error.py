"""Float arithmetic: anchors keep rebuilt states to the stated tolerance, and what is predicted is an upper bound."""

import math

import pytest
import torch

from mfx.engine.arithmetic import FloatState
from mfx.engine.arithmetic.floating import predict
from mfx.engine.arithmetic.signed import Signed
from mfx.options.gamma import BDIA, Gamma

TOLERANCE = {torch.float32: 6e-6, torch.float64: 1e-10}
GAMMAS = [1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999]


def driven(x, t):
    """A branch that hands on no error in x: another random value at every step."""
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(t))


def contracting(x, t):
    """A map of Lipschitz constant 1/2."""
    return torch.tanh(x.roll(1) / 2 + t)


def worst_error(branch, kind, depth, dtype, gamma, draw=lambda gamma: gamma):
    """In states rebuilt from the end, put right at anchors, relative to the largest element; and the anchors."""
    torch.manual_seed(0)
    x, v = torch.randn(100, dtype=dtype), 0.1 * torch.randn(100, dtype=dtype)
    gammas = [draw(gamma) for _ in range(depth)]
    state, every = FloatState.start(x, v, reversible=True), FloatState.anchor_every(gamma, dtype)
    streams, anchors = [x], {}
    for t in range(depth):
        streams.append(state.advance(branch(streams[t], t), kind, gammas[t]))
        if (t + 1) % every == 0 and t + 1 < depth:
            anchors[t + 1] = state.freeze()
    worst = 0.0
    for t in reversed(range(depth)):
        if t + 1 in anchors:
            state = anchors[t + 1].thaw(anchors[t + 1].tensors)
        found = state.retreat_x()
        state.retreat_v(branch(found, t), kind, gammas[t])
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


def one_sign(gamma):
    return Signed(gamma, torch.randint(0, 2, ()), 0)


def a_sign_for_each_row(gamma):
    return Signed(gamma, torch.randint(0, 2, (100,)), 0)


@pytest.mark.parametrize("draw", [one_sign, a_sign_for_each_row])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [16, 256])
@pytest.mark.parametrize("branch, kind", [(driven, "residual"), (contracting, "map")])
@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_signs_of_gamma_leave_them_within_the_tolerance(gamma, branch, kind, depth, dtype, draw):
    fraction = Gamma.of(BDIA(gamma))
    if FloatState.bytes_kept(fraction, dtype, depth) == math.inf or (kind == "map" and gamma >= 1 / 3):
        return  # nothing is rebuilt, or such signs are refused
    found, anchors = worst_error(branch, kind, depth, dtype, fraction, draw)
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


@pytest.mark.parametrize("gamma", [Gamma(1, 2), Gamma(9, 10)])
def test_what_walks_cannot_repeat_does_not_grow_from_anchor_to_anchor(gamma):
    """As where a branch rounds to bfloat16: values for nearly the same x differ in the third digit."""
    every = FloatState.anchor_every(gamma, torch.float32)

    def coarse(x, t):
        return driven(x, t) + 2.0**-8 * (2.0**20 * x).remainder(1)

    # An error below 2⁻⁸ in values is below γ^(−k)·2⁻⁸ in v, k steps back, and x has the sum of those in v.
    bound = 2.0**-8 * every / gamma.value**every
    one, many = (worst_error(coarse, "residual", depth, torch.float32, gamma)[0] for depth in (every, 8 * every))
    assert TOLERANCE[torch.float32] < one < bound
    assert many < bound
