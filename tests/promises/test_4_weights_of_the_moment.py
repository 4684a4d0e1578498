"""Gradients are those of the weights and the state that the forward pass found: fast, replaced and averaged weights."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import mfx

WIDTH, DEPTH = 6, 13


class Block(nn.Module):
    """x + tanh(fc(norm(x)))·scale, where scale is what the block holds."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return x + torch.tanh(self.fc(self.norm(x))) * self.scale


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(DEPTH))).double()


def pair(gamma, arithmetic):
    """The net that keeps nothing, and what it has to agree with: the model, or the net that keeps all."""
    model = make_model()
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma, arithmetic=arithmetic)
    if gamma == 0:
        return net, model
    return net, mfx.momentumize(model, gamma=gamma, arithmetic=arithmetic, memory_budget=1.0)


HOW = [(0.0, "exact"), (0.0, "float"), (0.9, "exact"), (0.9, "float")]


def batch(seed):
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maml(net):
    """Two inner steps with fast weights, and the outer gradients through them."""
    weights = dict(net.named_parameters())
    fast = weights
    for seed in range(2):
        loss = functional_call(net, fast, (batch(seed),)).square().mean()
        gradients = torch.autograd.grad(loss, [*fast.values()], create_graph=True)
        fast = {name: w - 0.1 * g for (name, w), g in zip(fast.items(), gradients, strict=True)}
    loss = functional_call(net, fast, (batch(2),)).square().mean()
    return torch.autograd.grad(loss, [*weights.values()])


def replaced(net):
    """Parameters are replaced between forward and backward."""
    loss = net(batch(0)).square().mean()
    old = [block.fc.weight for block in net]
    for block in net:
        block.fc.weight = nn.Parameter(block.fc.weight.detach() * 2)
    loss.backward()
    assert all(block.fc.weight.grad is None for block in net)
    return [weight.grad for weight in old]


def averaged(net):
    """Averaged weights are put in for an evaluation between forward and backward, and taken out after it."""
    average = AveragedModel(net)
    for seed in range(2):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.01)
        average.update_parameters(net)
        net(batch(seed)).square().mean().backward()
    loss = net(batch(3)).square().mean()
    own = dict(net.named_parameters())
    net.load_state_dict(average.module.state_dict(), assign=True)
    evaluated = net(batch(4)).detach()
    loss.backward()
    return [evaluated, *(p.grad for p in own.values())]


def by_functional_call(net):
    """Weights and buffers of a call, changed for the next call before the backward pass of the first."""
    losses, weights = [], []
    for factor in (1.0, 2.0):
        own = {name: (t.detach() * factor).requires_grad_() for name, t in net.named_parameters()}
        buffers = {name: t * factor for name, t in net.named_buffers()}
        losses.append(functional_call(net, (own, buffers), (batch(0),)).square().mean())
        weights += own.values()
    sum(losses).backward()
    return [w.grad for w in weights]


def assert_same(found, expected, how):
    scale = max(g.abs().max() for g in expected)
    for a, b in zip(found, expected, strict=True):  # in float64 arithmetic "float" rebuilds states to 1e-10
        assert torch.equal(a, b) if how != (0.9, "float") else (a - b).abs().max() <= 1e-8 * scale


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("use", [maml, replaced, averaged, by_functional_call], ids=lambda use: use.__name__)
def test_gradients_are_those_of_the_weights_of_the_forward_pass(use, how):
    assert_same(*map(use, pair(*how)), how)


class Stateful(nn.Module):
    """A branch with state of its own of every kind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.calls, self.mean, self.loose, self.cache = 0, None, torch.zeros(WIDTH, dtype=torch.float64), Cache()

    def forward(self, x):
        self.calls += 1
        self.mean = x.detach().mean(0) if self.mean is None else self.mean * 0.5 + x.detach().mean(0)
        self.loose += 0.1
        self.cache.seen.append(self.calls)
        return torch.tanh(self.fc(x) + self.mean + self.loose) * (1 + 0.1 * len(self.cache.seen))


class Cache:
    def __init__(self):
        self.seen = []


class Holding(nn.Module):
    """The sums around such branches."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(Stateful() for _ in range(4))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def own_state(net):
    return [(b.calls, b.mean.tolist(), b.loose.tolist(), b.cache.seen) for b in net.branches]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("options", [{}, {"recompute": "all"}], ids=str)
def test_state_of_a_models_own_is_as_with_the_model(options, arithmetic):
    torch.manual_seed(0)
    model = Holding().double()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, arithmetic=arithmetic, **options)
    for each in (model, net):
        losses = [each(batch(seed)).square().mean() for seed in range(2)]
        for loss in (*losses, each(batch(2)).square().mean()):
            loss.backward()
    assert own_state(net) == own_state(model)
    assert_same([p.grad for p in net.parameters()], [p.grad for p in model.parameters()], (0.0, arithmetic))
