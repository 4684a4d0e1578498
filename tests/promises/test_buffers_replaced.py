"""Buffers that a model's forward replaces by others instead of changing them in place."""

import copy

import pytest
import torch
from torch import nn

import mfx


class Counting(nn.Module):
    """x + tanh(fc(x) + its number of calls so far)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls = self.calls + 1
        return x + torch.tanh(self.fc(x) + self.calls)


def counting():
    torch.manual_seed(0)
    return nn.Sequential(*(Counting() for _ in range(3))).double()


def test_a_symbolic_trace_is_refused_and_leaves_them_alone():
    model = counting()
    before = [block.calls for block in model]
    with pytest.raises(mfx.MfxError, match=r"replaces buffers while it runs \(calls\).*in place"):
        mfx.momentumize(model, capture="symbolic")
    assert all(block.calls is calls for block, calls in zip(model, before, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_dynamo_replaces_them_once_per_call(gamma):
    model, x = counting(), torch.randn(5, 4, dtype=torch.float64)
    reference = copy.deepcopy(model)
    net = mfx.momentumize(model, gamma=gamma)
    for call in range(1, 4):
        out = net(x)
        out.sum().backward()
        state, v = x, torch.zeros_like(x)
        for block in reference:
            v = gamma * v + (1 - gamma) * torch.tanh(block.fc(state) + call)
            state = state + v
        # The exact arithmetic rounds to 2^-40 at each of 3 steps.
        torch.testing.assert_close(out, state, rtol=0, atol=3 * 9 * 2.0**-40)
        state.sum().backward()
        for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
            # Over three calls each is a sum of 15 products of a state and derivatives of at most 1.
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=15 * 3 * 9 * 2.0**-40)
        assert [block.calls.item() for block in net] == [call] * 3
