"""Values that fixed point cannot hold: too large, infinite, not a number."""

import math
import re

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mfx
from mfx.engine.arithmetic import ExactState, range_check
from mfx.engine.arithmetic.range_check import LIMIT, RangeCheck
from mfx.engine.arithmetic.signed import Signed
from mfx.options.gamma import Gamma
from tests.mfx.models import Stack, inputs, recurrence

SHORT, DEEP = 3, 16  # steps' inputs are kept in the short one


class Scaled(nn.Module):
    """Elementwise steps x + w·x."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.full((8,), 0.01)) for _ in range(depth))

    def forward(self, x):
        for weight in self.weights:
            x = x + weight * x
        return x


def branches(model):
    return [lambda x, w=weight: w.double() * x for weight in model.weights]


# --- too large -------------------------------------------------------------------------------------------------------


def too_large(depth):
    model = Stack(depth)
    with torch.no_grad():
        model.blocks[1].mix.weight.zero_()
        model.blocks[1].mix.bias.copy_(torch.tensor([1.0, -2.5e7, 3.0, 5e6, 0.0, 0.0, 0.0, 0.0]))
    return model


def test_overflow_names_the_chain_the_largest_value_and_what_to_do():
    model = too_large(DEEP)
    net = mfx.momentumize(model)
    message = r"chain blocks, at or before step blocks\.1: .*the largest 2\.5e\+07.*Normalise.*use arithmetic='float'"
    with pytest.raises(mfx.MfxError, match=message):
        net(inputs())
    with torch.no_grad():
        assert net(inputs()).isfinite().all()  # inference is in floating point
    mfx.momentumize(model, arithmetic="float")(inputs()).sum().backward()


def test_no_limit_where_inputs_are_kept():
    out = mfx.momentumize(too_large(SHORT), verify="raise")(inputs())
    assert out.isfinite().all()
    out.sum().backward()


def test_overflow_of_the_sum():
    model, x = Scaled(DEEP), torch.full((2, 8), 4e6)
    largest = next(size for state in states_of(model, x) if (size := state.abs().max().item()) >= LIMIT)
    with pytest.raises(
        mfx.MfxError, match=rf"chain \w+, at or before step .*the largest {re.escape(f'{largest:.3g}')},"
    ):
        mfx.momentumize(model, gamma=0.5)(x)


def states_of(model, x):
    v, x = 0.0, x.double()
    for f in branches(model):
        v = 0.5 * v + 0.5 * f(x)
        x = x + v
        yield x


def test_no_limit_at_gamma_zero():
    model, x = Scaled(DEEP), torch.full((2, 8), 1e12)
    assert torch.equal(mfx.momentumize(model, gamma=0.0)(x), model(x))


# --- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("depth", [SHORT, DEEP])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "branch"])
def test_non_finite_exactly_there(where, value, depth, arithmetic):
    torch.manual_seed(0)
    model, x = Scaled(depth), inputs()
    clean = mfx.momentumize(model, arithmetic=arithmetic, verify="raise")(x).detach()
    net = mfx.momentumize(model, arithmetic=arithmetic, verify="raise")
    with torch.no_grad():
        if where == "input":
            x[1, 3] = value
        else:
            model.weights[depth // 2][3] = value
    out = net(x)
    expected = recurrence(x.double(), branches(model), 0.9)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert out.isfinite().sum() == (15 if where == "input" else 14)
    assert torch.equal(out[out.isfinite()], clean[out.isfinite()])
    out.sum().backward()
    finite = torch.stack([weight.grad.isfinite() for weight in model.weights])
    assert finite.all(0).tolist() == [i != 3 for i in range(8)]  # the other elements' are none the worse


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_image_of_a_batch(value):
    torch.manual_seed(0)
    net = mfx.momentumize(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10), verify="raise")
    x = torch.randn(3, 3, 32, 32)
    clean = net(x).detach()
    x[1, 0, 0, 0] = value
    out = net(x)
    assert out.isfinite().all(1).tolist() == [True, False, True]
    torch.testing.assert_close(out[::2], clean[::2])
    out.sum().backward()


@pytest.mark.parametrize("depth", [SHORT, DEEP])
@pytest.mark.parametrize("gamma", [0.9, 0.0])
@pytest.mark.parametrize("how", ["forward", "backward"])
def test_grad_scaler_skips_the_step_and_goes_on(how, gamma, depth):
    torch.manual_seed(0)
    net, x = mfx.momentumize(Stack(depth), gamma=gamma, verify="raise"), inputs()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    # 2^127 times a loss of about 1 has gradients beyond float32's 2^128, one of 2^16 has not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16 if how == "forward" else 2.0**127, backoff_factor=2.0**-111)
    before = [p.clone() for p in net.parameters()]

    def train(x):
        optimizer.zero_grad()
        scaler.scale(net(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    bad = x.clone()
    bad[0, 0] = math.inf
    scale = scaler.get_scale()
    train(bad if how == "forward" else x * 10)
    assert all(map(torch.equal, net.parameters(), before))
    assert scaler.get_scale() == scale * 2.0**-111
    scaler.update(2.0**16)
    train(x)
    plain = mfx.momentumize(Stack(depth), gamma=gamma)
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), before, strict=True):
            parameter.copy_(value)
    step = torch.optim.SGD(plain.parameters(), lr=0.01)
    plain(x).square().sum().backward()
    step.step()
    assert any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):  # a power of two changes no digit
        torch.testing.assert_close(p, q, rtol=0, atol=0)


# --- where no look is needed ------------------------------------------------------------------------------------------


@given(
    gamma=st.sampled_from([0.0, 0.5, 0.9, 9999 / 10000]),
    kind=st.sampled_from(["residual", "map"]),
    scale=st.sampled_from([1.0, 1e4, 3e5, 2e6, 4e6]),
    drift=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_where_x_is_not_looked_at_nothing_is_missed(gamma, kind, scale, drift, seed):
    generator = torch.Generator().manual_seed(seed)
    x, *ys = (scale * (drift + torch.randn(8, generator=generator)) for _ in range(25))
    state = ExactState.start(x, None, reversible=True)
    for y in ys:
        state.advance(y, kind, Gamma.of(gamma))
        out = state.X.abs() >= int(LIMIT) << 40
        poisoned = torch.zeros_like(out) if state.range_check.poisoned is None else state.range_check.poisoned
        assert poisoned[out].all()


def test_x_is_looked_at_where_it_may_be_out_of_range_only(monkeypatch):
    seen = []
    extent = range_check._extent
    monkeypatch.setattr(range_check, "_extent", lambda t: seen.append(t.dtype) or extent(t))
    for scale, looks in ((1.0, 0), (LIMIT / 8, 1)):
        seen.clear()
        state = ExactState.start(torch.zeros(4), None, reversible=True)
        for y in (torch.full((4,), scale), *[torch.full((4,), -scale)] * 3):
            state.advance(y, "residual", Gamma.of(0.0))
        # Four steps of 1/8 of the limit: the last bound is half of it. Each branch's value and the start are looked at.
        assert (seen.count(torch.int64), seen.count(torch.float32)) == (looks, 5)


# --- where looking would mean waiting --------------------------------------------------------------------------------


@pytest.fixture
def never_reads_the_device(monkeypatch):
    """Every tensor as if it were on a device that computes while Python goes on."""

    monkeypatch.setattr(range_check, "_extent", lambda t: math.inf)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_value_is_found_without_looking(never_reads_the_device, dtype):
    guard = RangeCheck()
    guard.admit(torch.tensor([1.0, math.nan, math.inf, -8.0], dtype=dtype))
    assert guard.overflowed.item() == 0  # neither infinity nor NaN is an overflow
    assert guard.poisoned.tolist() == [False, True, True, False]
    none = torch.tensor([0, 0, 0, 0])
    guard.check(torch.tensor([0, 0, 0, -(5_000_000 << 40)]), none, "residual", Gamma(9, 10))
    guard.check(none, none, "residual", Gamma(9, 10))
    assert guard.overflowed.item() == 5e6
    assert guard.poisoned.tolist() == [False, True, True, True]
    if dtype != torch.float16:
        large = torch.tensor([1.0, 2.0, -(2.0**24), 0.0], dtype=dtype)
        assert guard.admit(large).tolist() == [1.0, 2.0, 0.0, 0.0]
        assert guard.overflowed.item() == 2.0**24


def test_without_looking_all_is_the_same(never_reads_the_device):
    torch.manual_seed(0)
    model = Stack(DEEP)
    net = mfx.momentumize(model, verify="raise")
    results = []
    for value in (0.0, math.nan):
        x = inputs()
        x[0, 0] = value
        net.zero_grad()
        out = net(x)
        out[1].sum().backward()
        results.append((out.detach()[1], [p.grad.clone() for p in net.blocks.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    with pytest.raises(mfx.MfxError, match=r"the largest 1e\+09"):
        mfx.momentumize(Scaled(DEEP))(torch.full((2, 8), 1e9))


def test_nothing_waits_for_the_device():
    """Tensors without data raise whenever a value is asked for."""
    guard = RangeCheck()
    y = torch.empty(3, 8, device="meta")
    guard.admit(y)
    X = V = torch.empty(3, 8, dtype=torch.int64, device="meta")
    guard.check(X, V, "residual", Gamma(9, 10))
    guard.check(X, V, "map", Signed(Gamma(1, 4), torch.empty((), dtype=torch.int64, device="meta"), 0))
    guard.poison(guard.clean(y))
    assert guard.overflowed.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.overflowed.item()
    net = mfx.momentumize(Stack(DEEP).to("meta"))
    net(torch.empty(2, 8, device="meta")).sum().backward()
    assert net.blocks[0].mix.weight.grad.device.type == "meta"
