"""Promise 6, memory: blocks that are in no chain cost no more than a checkpoint around every block, in both columns."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import mfx
from mfx.engine.memory.flops import FlopCounter
from tests.promises.models_with_blocks import MODELS, Projected, Same

pytestmark = pytest.mark.filterwarnings("ignore:.*is broadcast over the stream")


def made(name):
    torch.manual_seed(0)
    return MODELS[name][0]()


def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def cost(net, x, steps=3):
    """Return peak and FLOPs of a training step after some others."""
    for _ in range(steps - 1):
        net(x).square().mean().backward()
    with mfx.ActivationMeter(exclude=[x, *net.parameters()]) as meter, FlopCounter() as counter:
        net(x).square().mean().backward()
    return meter.peak, counter.flops


def checkpointed(name):
    model = made(name)
    for module in model.modules():
        if isinstance(module, MODELS[name][1]):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


def statistics(model):
    """Return the bytes of buffers, which a recomputation puts back; a checkpoint moves BatchNorm's on twice."""
    return sum(buffer.nbytes for buffer in model.buffers())


WAYS = [(name, "symbolic") for name in MODELS if name != "half a pair"] + [
    ("basic block", "dynamo"),
    ("mobilenet", "dynamo"),
]


@pytest.mark.parametrize(("name", "capture"), WAYS)
def test_neither_peak_nor_work_is_above_a_checkpoint_around_every_block(name, capture):
    x = images()
    peak, flops = cost(checkpointed(name), x)
    plain_peak, _ = cost(made(name), x)
    assert peak < 0.9 * plain_peak
    found = cost(mfx.momentumize(made(name), gamma=0.0, capture=capture), x)
    assert found[0] <= 1.005 * peak + statistics(made(name))
    assert found[1] <= 1.005 * flops


def test_the_part_of_a_block_before_a_chain_runs_again_too():
    """A chain keeps the state between the two steps of a block, which a checkpoint around the block does not."""
    x, states = images(), []
    peak, flops = cost(checkpointed("half a pair"), x)
    model = made("half a pair")
    for block in model[1:]:
        block.register_forward_hook(lambda _module, _args, y: states.append(y.nbytes))
    model(x)
    net = mfx.momentumize(made("half a pair"), gamma=0.0)
    assert runs(net, "3.mix.1", x) == 2
    found = cost(net, x)
    assert found[0] <= 1.005 * peak + sum(states)
    assert found[1] <= 1.005 * flops


@pytest.mark.parametrize(
    ("name", "arithmetic"), [("basic block", "exact"), ("bottleneck", "float"), ("two classes", "exact")]
)
def test_with_momentum_the_peak_is_that_of_zero_and_two_states(name, arithmetic):
    x = images()
    _, plain = cost(made(name), x)
    at_zero, _ = cost(mfx.momentumize(made(name), gamma=0.0), x)
    net = mfx.momentumize(made(name), gamma=0.9, arithmetic=arithmetic)
    peak, flops = cost(net, x)
    state = max(chain.storage.streams[0].elements for chain in mfx.explain(net).chains) * 2 * 4
    assert peak <= at_zero + 2 * state
    assert flops <= 1.34 * plain


def step(net, x):
    torch.manual_seed(3)
    net.zero_grad()
    y = net(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters()), *map(torch.clone, net.buffers()), torch.rand(2)]


@pytest.mark.parametrize(("name", "capture"), WAYS)
def test_it_is_the_original_model_bit_for_bit(name, capture):
    x, model = images(), made(name)
    net = mfx.momentumize(made(name), gamma=0.0, capture=capture, verify="raise")
    for _ in range(2):
        assert all(map(torch.equal, step(net, x), step(model, x)))


def runs(net, path, x):
    """Return how often a module runs in a training step."""
    count = [0]
    handle = net.get_submodule(path).register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    net(x).sum().backward()
    handle.remove()
    return count[0]


BLOCK, INSIDE = "layer2.0", "layer2.0.conv1"  # in no chain


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 2),
        ({"memory_budget": 1.0}, 1),
        ({"skip": "layer2*"}, 1),
        ({"only": ["layer1", "layer4"]}, 1),
        ({"recompute": "all"}, 2),
    ],
    ids=str,
)
def test_the_user_has_the_last_word(options, times):
    net = mfx.momentumize(made("basic block"), gamma=0.0, **options)
    assert [runs(net, INSIDE, images()) for _ in range(2)] == [times, times]


def test_hooks_on_a_stage_of_such_blocks_run_whenever_they_are_there():
    """Blocks are recomputed one by one; a stage that somebody looks at is called as a whole."""
    net, x = mfx.momentumize(made("basic block"), gamma=0.0), images()
    assert runs(net, INSIDE, x) == 2
    assert runs(net, "layer2", x) == 1
    least, _ = cost(net, x)
    handle = net.layer2.register_forward_hook(lambda *_: None)
    assert cost(net, x)[0] > least
    handle.remove()
    assert cost(net, x)[0] == least


class Shifted(Projected):
    """A block that saves neither what it is given nor what it returns."""

    def forward(self, x):
        return super().forward(x.sub(1)).sub(1)


class Changed(nn.Module):
    """Blocks of which others change the inputs or outputs in place."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.first, self.second = (nn.Sequential(Same(4), Same(4)) for _ in range(2))
        self.alone = Shifted(4, 4)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.last(self.first(x))
        z = self.alone(y)
        if self.where == "input":
            y.mul_(2)
        if self.where == "output":
            z.mul_(2)
        return self.second(z.tanh()) + (y.mean() if self.where == "input" else 0)


@pytest.mark.parametrize("where", ["input", "output", "nowhere"])
def test_a_block_whose_values_are_changed_later_stays_as_it_was(where):
    def make():
        torch.manual_seed(0)
        return Changed(where).eval()

    x = torch.randn(2, 4, 8, 8)
    net = mfx.momentumize(make(), gamma=0.0)
    assert runs(net, "alone.skip", x) == (2 if where == "nowhere" else 1)


def test_weights_of_the_moment_are_those_of_the_recomputation():
    x, model = images(), made("two classes").eval()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    other = {name: (p + 1e-2).detach().requires_grad_() for name, p in model.named_parameters()}
    found, expected = (
        torch.autograd.grad(functional_call(m, other, (x,)).square().mean(), [*other.values()]) for m in (net, model)
    )
    assert all(map(torch.equal, found, expected))


def test_a_number_of_bytes_bounds_them_too():
    x = images()
    least, most = (cost(mfx.momentumize(made("mobilenet"), gamma=0.0, memory_budget=b), x)[0] for b in (0.0, 1.0))
    budget = (least + most) // 2
    net = mfx.momentumize(made("mobilenet"), gamma=0.0, memory_budget=budget)
    peaks = [cost(net, x, 1)[0] for _ in range(8)]
    assert max(peaks[2:]) <= budget
    assert peaks[-1] > least


def test_the_peak_is_predicted():
    x, net = images(), mfx.momentumize(made("bottleneck"), gamma=0.0)
    for _ in range(2):
        net(x).sum().backward()
    with mfx.ActivationMeter(exclude=[x, *net.parameters()]) as meter:
        y = net(x)
        y.sum().backward()
        del y
    assert mfx.explain(net, x).to_dict()["totals"]["momentum"]["peak"] == pytest.approx(meter.peak, rel=0.03)
