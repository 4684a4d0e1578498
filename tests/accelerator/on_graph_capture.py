"""Graph capture: works where nothing is drawn, else it is refused; and generators are not read."""

import pytest
import torch

import mfx
from mfx.engine import flags
from mfx.engine.recompute.random_clock import RandomClock
from mfx.modules.random_state import global_generators
from tests.accelerator import device as fake
from tests.accelerator.nets import Block, batch, momentumized, stack, trained
from tests.accelerator.on_flags import Noisy, Normed

PLACES = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


def captured(net, x):
    with fake.backend.capture():
        y = net(x)
        y.square().sum().backward()


@pytest.mark.parametrize("block", [Block, Normed])
@pytest.mark.parametrize("arithmetic, gamma", PLACES)
def test_a_step_that_draws_nothing_can_be_captured(arithmetic, gamma, block):
    model = stack(block)
    options = {"arithmetic": arithmetic, "gamma": gamma}
    expected = trained(momentumized(model, **options), batch())
    net = momentumized(model, **options)
    fresh = momentumized(model, **options)
    fresh.load_state_dict(net.state_dict())
    net(fake.to_device(batch()))  # graphs are captured by mfx itself at a first call
    for (_, a), (_, b) in zip(net.named_buffers(), fresh.named_buffers(), strict=True):
        a.copy_(b)
    x = fake.to_device(batch()).requires_grad_()
    fake.backend.manual_seed(2)
    captured(net, x)
    found = [fake.on_host(t.grad) for t in (x, *net.parameters())]
    assert all(map(torch.equal, found, expected[:-2]))
    after = fake.on_host(fake.to_device(torch.zeros(3)).uniform_())
    assert torch.equal(after, expected[-2])


@pytest.mark.parametrize("arithmetic, gamma", PLACES)
def test_a_step_that_draws_is_refused_and_leaves_the_generator(arithmetic, gamma):
    net = momentumized(stack(lambda: Block(0.3)), arithmetic=arithmetic, gamma=gamma)
    x = fake.to_device(batch())
    net(x)
    before = fake.backend.get_rng_state()
    with pytest.raises(mfx.MfxError, match="draws random numbers while a graph is captured"):
        captured(net, x)
    assert torch.equal(fake.backend.get_rng_state(), before)
    kept = momentumized(stack(lambda: Block(0.3)), arithmetic=arithmetic, gamma=gamma, memory_budget=1.0)
    kept(x)
    captured(kept, x)


def test_a_backward_pass_that_has_to_draw_again_is_refused():
    # Not a whole backward pass: an error in a hook ends the process, on a device written in Python.
    clock = RandomClock(global_generators(torch.device("fake:0")))
    fake.to_device(torch.zeros(3)).uniform_()
    (draw,) = clock.tick()
    refusal = pytest.raises(mfx.MfxError, match="the backward pass, which has to draw them again")
    with fake.backend.capture(), refusal, draw.repeated():
        pass


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_an_error_that_waits_is_refused(gamma):
    net = momentumized(stack(), gamma=gamma, verify="raise")
    x = fake.to_device(batch())
    net(x)
    with pytest.raises(mfx.MfxError, match="verify='raise' waits for the device"):
        captured(net, x)


def test_what_a_captured_graph_finds_is_said_when_the_net_is_looked_at():
    flags._UNREAD.clear()
    net = momentumized(stack(Noisy))
    x = fake.to_device(batch())
    with torch.no_grad():
        net(x)
    captured(net, x)
    with pytest.warns(UserWarning, match="did not lead back"):
        net.state_dict()
    flags._UNREAD.clear()
