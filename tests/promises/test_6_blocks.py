"""Promise 6, memory: blocks that are in no chain cost no more than a checkpoint around every block, in both columns."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import mfx
from mfx.engine.memory.flops import FlopCounter


class Wide(nn.Module):
    """x + f(x) of a ConvNeXt."""

    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
            nn.Dropout(0.2),
        )

    def forward(self, x):
        return x + self.f(x)


def convnext():
    def down(width, out):
        return nn.Sequential(nn.GroupNorm(1, width), nn.Conv2d(width, out, 2, 2))

    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), Wide(8), Wide(8), down(8, 16), Wide(16), down(16, 32), Wide(32))


def branch(width, out, stride=1):
    first = nn.Conv2d(width, out, 3, stride, 1)
    return nn.Sequential(first, nn.BatchNorm2d(out), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(out, out, 3, 1, 1))


class Same(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.f = branch(width, width)

    def forward(self, x):
        return torch.relu(x + self.f(x))


class Projected(nn.Module):
    """A block of another class than those in chains, as in some ports of ResNets."""

    def __init__(self, width, out):
        super().__init__()
        self.f, self.skip = branch(width, out, 2), nn.Conv2d(width, out, 1, 2)

    def forward(self, x):
        return torch.relu(self.skip(x) + self.f(x))


def two_classes():
    stages = [nn.Sequential(Projected(8 << i, 16 << i), Same(16 << i), Same(16 << i)) for i in range(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Same(8), Same(8), *stages)


def resnet(block):
    return ResNet(block, [2, 2, 1, 3] if block is BasicBlock else [2, 1, 3, 1], num_classes=3)


MODELS = {
    "basic block": (partial(resnet, BasicBlock), BasicBlock),
    "bottleneck": (partial(resnet, Bottleneck), Bottleneck),
    "convnext": (convnext, Wide),
    "mobilenet": (partial(mobilenet_v2, num_classes=3), InvertedResidual),
    "two classes": (two_classes, (Same, Projected)),
}


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


WAYS = [(name, "symbolic") for name in MODELS] + [("basic block", "dynamo"), ("mobilenet", "dynamo")]


@pytest.mark.parametrize(("name", "capture"), WAYS)
def test_neither_peak_nor_work_is_above_a_checkpoint_around_every_block(name, capture):
    x = images()
    peak, flops = cost(checkpointed(name), x)
    plain_peak, _ = cost(made(name), x)
    assert peak < 0.9 * plain_peak
    found = cost(mfx.momentumize(made(name), gamma=0.0, capture=capture), x)
    assert found[0] <= 1.005 * peak + statistics(made(name))
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
