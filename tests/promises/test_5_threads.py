"""Threads that share a net: while one puts state back for a recomputation, the others wait."""

import threading
import time

import pytest
import torch
from torch import Tensor, nn

import mfx

DEPTH = 9  # walked back at γ = 1/2


class Counting(nn.Module):
    """tanh(fc(x) + its number of calls so far / 10); it looks if the number stays as it is while it runs."""

    def __init__(self, *, differentiates: bool) -> None:
        super().__init__()
        self.fc, self.calls, self.differentiates = nn.Linear(3, 3).double(), 0, differentiates
        self.disturbed = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        calls = self.calls
        y = torch.tanh(self.fc(x) + self.calls / 10)
        if self.differentiates:
            (y,) = torch.autograd.grad(y.square().sum(), y, create_graph=True)
        time.sleep(0.002)
        if self.calls != calls:
            self.disturbed.append(calls)
        return y


def counting(gamma: float, *, differentiates: bool) -> mfx.MomentumNet:
    torch.manual_seed(0)
    return mfx.MomentumNet([Counting(differentiates=differentiates)] * DEPTH, gamma, use_backprop=False)  # they meet


def trained(net: nn.Module, at_once: bool) -> list[Tensor]:
    """Return outputs and gradients of two forward passes, of which the second runs beside the backward of the first."""
    xs = [torch.full((2, 3), value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.7)]
    outputs = [net(xs[0])]

    def run_back() -> None:
        outputs[0].sum().backward()

    thread = threading.Thread(target=run_back, daemon=True)
    if at_once:
        thread.start()
    outputs.append(net(xs[1]))
    if not at_once:
        thread.start()
    thread.join(300)
    assert not thread.is_alive()
    outputs[1].sum().backward()
    return [*outputs, *(x.grad for x in xs), *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("differentiates", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_forward_and_a_backward_pass_at_once(gamma, differentiates):
    nets = [counting(gamma, differentiates=differentiates) for _ in range(2)]
    found, expected = (trained(net, at_once) for net, at_once in zip(nets, (True, False), strict=True))
    assert not any(net.functions[0].disturbed for net in nets)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert nets[0].functions[0].calls == 2 * DEPTH


class Slow(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        time.sleep(0.002)
        return torch.tanh(y)


def test_backward_passes_at_once_leave_the_buffers_of_the_model():
    net = mfx.MomentumNet([Slow(3) for _ in range(DEPTH)], 0.5, use_backprop=False)
    buffers = dict(net.named_buffers())
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = [net(x) for _ in range(4)]
    threads = [threading.Thread(target=lambda y=y: y.sum().backward(), daemon=True) for y in outputs]
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    for name, buffer in net.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, values[name])
