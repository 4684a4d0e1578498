"""Errors and warnings on a device: nothing is waited for, and nothing is read before it has arrived."""

import warnings

import pytest
import torch
from torch import nn

import mfx
from mfx.engine import flags
from mfx.engine.arithmetic.fused_kernels import _numbers
from mfx.options.gamma import Gamma
from tests.accelerator import device as fake
from tests.accelerator.nets import Block, batch, momentumized, stack

NOT_THE_SAME = "did not lead back|did not compute the values"


class Noisy(Block):
    """A branch whose recomputation computes other values."""

    def __init__(self):
        super().__init__()
        self.a.register_forward_pre_hook(lambda module, args: (args[0] * (1 + 1e-3 * mfx.recomputing()),))


class Large(Block):
    def forward(self, x):
        return x + 1e7 * torch.tanh(self.a(x))


class Normed(Block):
    """A branch with buffers, of which one never changes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x):
        return x + self.b(self.norm(self.a(x)) * self.scale)


@pytest.fixture(autouse=True)
def nothing_left():
    flags._UNREAD.clear()
    yield
    flags._UNREAD.clear()


def step(net):
    fake.forget()
    net(fake.to_device(batch())).sum().backward()


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_a_warning_is_not_looked_at_before_it_has_arrived(gamma):
    net = momentumized(stack(Noisy), gamma=gamma)
    for _ in range(2):
        step(net)  # nothing has arrived: what lies on the host now is something else
    assert not fake.SYNCHRONISATIONS
    fake.backend.arrive()
    with pytest.warns(UserWarning, match=NOT_THE_SAME):
        step(net)
    assert not fake.SYNCHRONISATIONS


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_an_error_waits_once_and_comes_before_the_optimizer(gamma):
    net = momentumized(stack(Noisy), gamma=gamma, verify="raise")
    with pytest.raises(mfx.MfxError, match=NOT_THE_SAME):
        step(net)
    assert len(fake.SYNCHRONISATIONS) == 1
    fine = momentumized(stack(), gamma=gamma, verify="raise")
    step(fine)
    step(fine)
    assert fake.SYNCHRONISATIONS == ["event"]


def test_values_out_of_range_are_said_when_they_have_arrived():
    net = momentumized(stack(Large))
    step(net)
    step(net)
    fake.backend.arrive()
    with pytest.raises(mfx.MfxError, match="more than arithmetic='exact' can hold"):
        step(net)
    assert not fake.SYNCHRONISATIONS


class Streams(nn.Module):
    """Two streams of which the first reads the second, and one of them becomes too large."""

    def __init__(self, large):
        super().__init__()
        torch.manual_seed(0)
        self.fs, self.gs = (nn.ModuleList(nn.Linear(8, 8) for _ in range(9)) for _ in range(2))
        self.scales = [1e8 if i == large else 1.0 for i in range(2)]

    def forward(self, x, y):
        for f, g in zip(self.fs, self.gs, strict=True):
            x = x + self.scales[0] * torch.tanh(f(x + y))
            y = y + self.scales[1] * torch.tanh(g(y))
        return x, y


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("large", [0, 1])
@pytest.mark.parametrize("used", [0, 1])
def test_values_out_of_range_are_said_whichever_stream_a_gradient_comes_by(used, large, budget):
    net = momentumized(Streams(large), verify="raise", memory_budget=budget)
    out = net(fake.to_device(batch()), fake.to_device(batch()))
    with pytest.raises(mfx.MfxError, match="more than arithmetic='exact' can hold"):
        out[used].sum().backward()


@pytest.mark.parametrize("options", [{}, {"arithmetic": "float"}, {"gamma": 0.0}, {"memory_budget": 1.0}], ids=str)
@pytest.mark.parametrize("block", [Block, Normed])
def test_no_step_waits_or_copies_to_the_device(block, options):
    net = momentumized(stack(block), **options)
    x = fake.to_device(batch())
    for gamma in (None, 0.9, 0.5, 0.25):
        if gamma is not None and options.get("gamma") != 0.0:
            mfx.set_gamma(net, gamma)
        fake.forget()
        net(x).sum().backward()
        assert fake.SYNCHRONISATIONS == []
        assert fake.FROM_HOST == []
        fake.backend.arrive()


def test_buffers_that_never_change_are_copied_no_more_once_that_is_known():
    net = momentumized(stack(Normed), gamma=0.0)
    launches = []
    for _ in range(4):
        step(net)
        fake.backend.arrive()
        launches.append(fake.LAUNCHES["clone"])
    assert launches[-1] < launches[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net)


def test_a_new_gamma_is_no_copy_to_the_device():
    fake.forget()
    numbers = _numbers(Gamma(7, 11), torch.device("fake:0"))
    assert fake.FROM_HOST == []
    assert fake.on_host(numbers).tolist() == [4 / 11, 7, 11]
