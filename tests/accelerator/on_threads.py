"""Autograd has a thread for each device: nodes of one branch that lie on two ask at the same time."""

import sys
import threading
import time

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.accelerator import device as fake
from tests.accelerator.nets import DEPTH, WIDTH, batch, momentumized, stack, trained


class Offloaded(nn.Module):
    """A branch of which one part runs on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.begin = nn.Linear(WIDTH, WIDTH), nn.Identity()
        self.begin.register_forward_pre_hook(lambda *args: time.sleep(0.006 * mfx.recomputing()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(x)
        here = torch.tanh(self.inner(h))
        there = torch.tanh(h.to("cpu") * 2).to("fake")  # the last one, so its node is the first
        return x + (here + there)


@pytest.fixture
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("arithmetic, gamma", [("exact", 0.9), ("float", 0.9), ("exact", 0.0)])
def test_two_threads_rebuild_one_after_the_other(arithmetic, gamma, switching):
    options = {"arithmetic": arithmetic, "gamma": gamma}
    kept = trained(momentumized(stack(Offloaded), memory_budget=1.0, **options), batch())
    net = momentumized(stack(Offloaded), **options)
    for _ in range(3):
        for a, b in zip(trained(net, batch()), kept, strict=True):
            error = (a - b).abs().max() / b.abs().max()
            assert error <= (1e-6 if arithmetic == "exact" else 1e-4)  # three gradients are added as they arrive
    assert len(fake.THREADS) > 1


class Late(torch.autograd.Function):
    """The identity, whose backward pass takes a while."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x * 1

    @staticmethod
    def backward(ctx, g):
        time.sleep(ctx.seconds)
        return g, None


class DifferentiatingOffloaded(Offloaded):
    """As ``Offloaded``; one of the two parts is differentiated by the branch itself, so the recomputation needs it."""

    late = differentiated = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.begin(x)
        parts = {"fake": torch.tanh(self.inner(h)), "cpu": torch.tanh(h.to("cpu") * 2)}
        y = torch.tanh(parts[self.differentiated])
        (y,) = torch.autograd.grad(y.square(), y, torch.ones_like(y), create_graph=True)
        here, there = (Late.apply(part, 0.003 * (device == self.late)) for device, part in parts.items())
        return x + (here + y.to("fake") + there.to("fake"))


@pytest.mark.parametrize("late, differentiated", [("fake", "fake"), ("fake", "cpu"), ("cpu", "fake")])
@pytest.mark.parametrize("arithmetic, gamma", [("exact", 0.9), ("float", 0.9), ("exact", 0.0)])
def test_a_recomputation_that_waits_for_the_other_thread(arithmetic, gamma, late, differentiated, monkeypatch):
    """The first thread recomputes, and waits for autograd in the second one, which waits for what is recomputed."""
    monkeypatch.setattr(DifferentiatingOffloaded, "late", late)
    monkeypatch.setattr(DifferentiatingOffloaded, "differentiated", differentiated)
    options = {"arithmetic": arithmetic, "gamma": gamma}
    kept = trained(momentumized(stack(DifferentiatingOffloaded), memory_budget=1.0, **options), batch())
    net, found = momentumized(stack(DifferentiatingOffloaded), **options), []
    thread = threading.Thread(target=lambda: found.extend(trained(net, batch())), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    for a, b in zip(found, kept, strict=True):
        error = (a - b).abs().max() / b.abs().max()
        assert error <= (1e-6 if arithmetic == "exact" else 1e-4)


class Differentiating(nn.Module):
    """A branch with state of its own that runs a backward pass in the forward pass, once ``go`` allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls, self.go = nn.Linear(WIDTH, WIDTH), 0, lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.go()
        y = torch.tanh(self.fc(x) + self.calls / 10)
        (y,) = torch.autograd.grad(y.square(), y, torch.ones_like(y), create_graph=True)
        return y


def differentiating(gamma: float) -> mfx.MomentumNet:
    torch.manual_seed(0)
    net = mfx.MomentumNet([Differentiating() for _ in range(DEPTH)], gamma, use_backprop=False)
    return fake.to_device(net)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_forward_that_runs_autograd_beside_a_backward_pass(gamma):
    found, expected = (_two_passes(differentiating(gamma), at_once) for at_once in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def _two_passes(net: mfx.MomentumNet, at_once: bool) -> list[Tensor]:
    """Return outputs and gradients; if at once, the device's thread waits for the second forward when that needs it."""
    outputs = [net(fake.to_device(batch()))]
    thread = threading.Thread(target=lambda: outputs[0].sum().backward(), daemon=True)

    def go() -> None:
        if not mfx.recomputing() and not thread.ident:
            thread.start()
            time.sleep(0.3)  # the device's thread has come to the first recomputation

    if at_once:
        net.functions[DEPTH // 2].go = go
    outputs.append(net(fake.to_device(batch() * 2)))
    if not at_once:
        thread.start()
    thread.join(300)
    assert not thread.is_alive()
    outputs[1].sum().backward()
    return [*map(fake.on_host, outputs), *(fake.on_host(p.grad) for p in net.parameters())]
