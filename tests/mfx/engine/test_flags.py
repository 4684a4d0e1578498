"""Flags that lie on a device: when they are read, and how often the device is waited for."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import mfx
from mfx.engine import flags


class Noisy(nn.Module):
    """A branch whose recomputation computes other values."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.inner.register_forward_pre_hook(lambda module, args: (args[0] * (1 + 1e-3 * mfx.recomputing()),))

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


class Large(Noisy):
    """A branch whose values do not fit exact arithmetic."""

    def forward(self, x):
        return x + 1e7 * torch.tanh(self.inner(x))


@pytest.fixture
def reads(monkeypatch):
    """The number of flags in each read; flags count as lying on another device."""
    found = []
    say = flags._say

    def counted(unread):
        if unread:
            found.append(len(unread))
        say(unread)

    monkeypatch.setattr(flags, "_is_away", lambda value: True)
    monkeypatch.setattr(flags, "_say", counted)
    monkeypatch.setattr(flags, "_UNREAD", {})
    return found


def trained(block=Noisy, depth=9, **options):
    torch.manual_seed(0)
    net = mfx.momentumize(nn.Sequential(*(block() for _ in range(depth))), **options)
    return net, torch.randn(4, 8)


NOT_THE_SAME = r"chain \S+: rebuilding the activations did not lead back|did not compute the values"


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_an_error_comes_before_the_optimizer_and_waits_once(gamma, reads):
    net, x = trained(gamma=gamma, verify="raise")
    y = net(x).sum()
    assert not reads
    with pytest.raises(mfx.MfxError, match=NOT_THE_SAME):
        y.backward()
    assert len(reads) == 1
    net.state_dict()
    assert len(reads) == 1  # it was said


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_values_out_of_range_are_an_error_before_the_optimizer(budget, frozen, reads):
    net, x = trained(Large, verify="raise", memory_budget=budget)
    net[0].requires_grad_(not frozen)
    y = net(x).sum()
    assert not reads
    with pytest.raises(mfx.MfxError, match="more than arithmetic='exact' can hold"):
        y.backward()


LOOKS = {
    "state_dict": lambda net, x: net.state_dict(),
    "set_gamma": lambda net, x: mfx.set_gamma(net, 0.5),
    "explain": lambda net, x: mfx.explain(net),
    "the next call": lambda net, x: net(x),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_warning_comes_when_the_net_is_looked_at(look, reads):
    net, x = trained()
    net(x).sum().backward()
    assert not reads
    with pytest.warns(UserWarning, match=NOT_THE_SAME):
        look(net, x)
    assert len(reads) == 1
    look(net, x)  # once per chain
    flags._take()


def test_nothing_is_read_in_a_step_where_nothing_waits(reads):
    net, x = trained()
    net(x).sum().backward()
    assert not reads
    flags._take()


def test_a_process_that_ends_after_its_last_backward_pass_says_so():
    code = """
        import torch, mfx
        from tests.mfx.engine.test_flags import Large, trained
        from mfx.engine import flags
        flags._is_away = lambda value: True
        def main():
            net, x = trained({options})
            net(x).sum().{last}
        main()
    """
    for options, last, said in (
        ("", "backward()", "did not lead back"),
        ("Large", "item()", "can hold"),
    ):
        text = textwrap.dedent(code).format(options=options, last=last)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
        assert done.stderr.count("mfx: ") == 1
        assert said in done.stderr
