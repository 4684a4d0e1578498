"""Forwards that differentiate: energies, penalties and fields of forces, in branches and around chains."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import mfx
from tests.sampling import grid

WIDTH, DEPTH = 4, 3
pytestmark = pytest.mark.filterwarnings("ignore:mfx")  # some are no one graph, or have no chain
FLAGS = [{}, {"memory_budget": 1.0}, {"arithmetic": "float"}, {"recompute": "all"}]


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def gradient(y, x, **options):
    """Return the gradient of a sum, which can be differentiated again."""
    return torch.autograd.grad(y.sum(), x, create_graph=True, **options)[0]


class Net(nn.Module):
    """A stem, steps of two branches each, and a head."""

    def __init__(self, forward):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.f, self.e = (nn.ModuleList(mlp() for _ in range(DEPTH)) for _ in range(2))
        self.fields = nn.ModuleList(Field() for _ in range(DEPTH))
        self.scores = nn.ModuleList(Score() for _ in range(DEPTH))
        self.states = forward

    def forward(self, x):
        return self.states(self, x)


class Field(nn.Module):
    """The gradient of an energy by two values."""

    def __init__(self):
        super().__init__()
        self.energy = mlp()

    def forward(self, q, p):
        half = WIDTH // 2
        energy = self.energy(torch.cat([q[..., :half], p[..., :half]], -1)).sum()
        return torch.autograd.grad(energy, (q, p), create_graph=True)


class Score(nn.Module):
    """A gradient by torch.func, in a module that holds no sum."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return torch.func.grad(lambda z: self.net(z).sum())(x)


class Learning(Score):
    """A backward pass in a branch, which adds to the gradients of its parameters."""

    def forward(self, x):
        z = x.detach().requires_grad_()
        self.net(z).sum().backward()
        return z.grad


# --- by the input of the branch itself, or around chains: nothing is in the way ---------------------------------------


def own_input(net, x):
    x = net.stem(x)
    for f, e in zip(net.f, net.e, strict=True):
        x = x - 0.1 * gradient(e(x), x)
        x = x + f(x)
    return net.head(x)


def chain_in_an_energy(net, x):
    x = net.stem(x)
    for e in net.e:
        z = e(x)
        for f in net.f:
            z = z + f(z)
        x = x + gradient(z, x)
    return net.head(x)


def penalty(net, x):
    x, total = net.stem(x), 0
    for f in net.f:
        y = f(x)
        total = total + gradient(y, x).pow(2).sum()
        x = x + y
    return net.head(x), total


def force(net, x):
    x = x.clone().requires_grad_()
    y = net.stem(x)
    for f in net.f:
        y = y + f(y)
    energy = net.head(y).sum(-1)
    return energy, -gradient(energy, x)


def middle_states(net, x):
    states = [net.stem(x)]
    for f in net.f:
        states.append(states[-1] + f(states[-1]))
    score = net.head(states[-1]).sum()
    return states[-1], *torch.autograd.grad(score, states[:-1], create_graph=True)


# --- through what lies outside of the branch --------------------------------------------------------------------------


def _with_second_branches(net, x, second):
    x = net.stem(x)
    y = torch.tanh(x)
    for f in net.f:
        y = y + f(y)
    for number, f in enumerate(net.f):
        y = y + second(number, y, x)
        y = y + f(y)
    return net.head(y)


def earlier_value(net, x):
    return _with_second_branches(net, x, lambda i, y, x: gradient(net.e[i](y), x))


def earlier_value_on_two_ways(net, x):
    return _with_second_branches(net, x, lambda i, y, x: gradient(net.e[i](y) + net.e[i](x) * y, x))


def earlier_value_unused(net, x):
    return _with_second_branches(net, x, lambda i, y, x: gradient(net.e[i](x) + y, x, allow_unused=True))


def in_a_module(net, x):
    return _with_second_branches(net, x, lambda i, y, x: net.fields[i](y, x)[1])


def state_before(net, x):
    x = net.stem(x)
    for f, e in zip(net.f, net.e, strict=True):
        y = x + f(x)
        x = y + gradient(e(y), x)
    return net.head(x)


def input_of_the_model(net, x):
    y = net.stem(x)
    for f in net.f:
        y = y + f(y)
    return y + gradient(net.head(y), x)


def hamiltonian(net, x):
    q, p = net.stem(x).chunk(2, -1)
    for field in net.fields:
        p = p - 0.1 * field(q, p)[0]
        q = q + 0.1 * field(q, p)[1]
    return net.head(torch.cat([q, p], -1))


def parameter(net, x):
    weight = net.stem.weight
    return _with_second_branches(net, x, lambda i, y, x: torch.ones_like(y) * gradient(net.e[i](y), weight).sum(0))


def parameter_of_two_branches(net, x):
    x, e = net.stem(x), net.e[0]
    for _ in net.f:
        x = x + e(x)
        x = x + torch.ones_like(x) * gradient(e(x), e[0].weight).sum(0)
    return net.head(x)


# --- by torch.func, and by backward passes ----------------------------------------------------------------------------


def func_grad(net, x):
    return _with_second_branches(net, x, lambda i, y, x: torch.func.grad(lambda z: (net.e[i](z) * x).sum())(y))


def func_vjp(net, x):
    return _with_second_branches(net, x, lambda i, y, x: torch.func.vjp(net.e[i], y)[1](y)[0])


def func_jvp(net, x):
    return _with_second_branches(net, x, lambda i, y, x: torch.func.jvp(net.e[i], (y,), (x,))[1])


def func_vmap_of_grad(net, x):
    return _with_second_branches(
        net, x, lambda i, y, x: torch.func.vmap(torch.func.grad(lambda z: net.e[i](z).sum()))(y)
    )


def func_in_a_module(net, x):
    return _with_second_branches(net, x, lambda i, y, x: net.scores[i](y))


def func_around_a_chain(net, x):
    def energy(z):
        for f in net.f:
            z = z + f(z)
        return z.sum()

    x = net.stem(x)
    return net.head(x + torch.func.grad(energy)(x))


def backward(net, x):
    x = net.stem(x)
    for f, e in zip(net.f, net.e, strict=True):
        z = x.detach().requires_grad_()
        e(z).sum().backward()
        x = x + z.grad
        x = x + f(x)
    return net.head(x)


def backward_through_the_stream(net, x):
    x = net.stem(x)
    for f, e in zip(net.f, net.e, strict=True):
        x = x + f(x)
        x.retain_grad()
        e(x).sum().backward(retain_graph=True)
        x = x + x.grad.detach()
    return net.head(x)


def backward_of_the_net(net, x):
    z = x.detach().requires_grad_()
    y = net.stem(z)
    for f in net.f:
        y = y + f(y)
    y.sum().backward(retain_graph=True)
    return net.head(y + z.grad)


WITH_CHAINS = {f.__name__: f for f in (own_input, chain_in_an_energy, penalty, force, middle_states)}
OUTSIDE = {
    f.__name__: f
    for f in (
        earlier_value,
        earlier_value_on_two_ways,
        earlier_value_unused,
        in_a_module,
        state_before,
        input_of_the_model,
        hamiltonian,
        parameter,
        parameter_of_two_branches,
    )
}
OTHERS = {
    f.__name__: f
    for f in (
        func_grad,
        func_vjp,
        func_jvp,
        func_vmap_of_grad,
        func_in_a_module,
        func_around_a_chain,
        backward,
        backward_through_the_stream,
        backward_of_the_net,
    )
}


def step(model):
    """Return outputs and gradients of a training step, the second of two."""
    for seed in range(2):
        model.zero_grad()
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        outputs = pytree.tree_leaves(model(x))
        sum(y.double().pow(2).sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), x.grad, *(p.grad for p in model.parameters())]


def first_step(model):
    """Return outputs and gradients of the first call."""
    x = torch.ones(3, WIDTH, requires_grad=True)
    outputs = pytree.tree_leaves(model(x))
    sum(y.double().pow(2).sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), x.grad, *(p.grad for p in model.parameters())]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert type(a) is torch.Tensor
            assert torch.equal(a, b)


def make(forward):
    torch.manual_seed(0)
    return Net(forward)


@grid(14, forward=WITH_CHAINS | OUTSIDE | OTHERS, options=FLAGS)
def test_at_gamma_zero_it_is_the_model(forward, options):
    model = make(forward)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, **options)
    assert_same(first_step(net), first_step(copy.deepcopy(model)))
    assert_same(step(net), step(model))


@grid(5, forward=WITH_CHAINS | OUTSIDE | OTHERS)
def test_at_gamma_zero_it_is_the_model_by_dynamo(forward):
    model = make(forward)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture="dynamo")
    assert_same(first_step(net), first_step(model))


@grid(8, forward=WITH_CHAINS | OUTSIDE | OTHERS)
def test_with_momentum_the_budget_changes_nothing_or_it_is_refused(forward):
    model = make(forward)
    try:
        expected = step(mfx.momentumize(copy.deepcopy(model), gamma=0.5, memory_budget=1.0))
    except mfx.MfxError:
        with pytest.raises(mfx.MfxError):
            step(mfx.momentumize(model, gamma=0.5))
        return
    assert_same(step(mfx.momentumize(model, gamma=0.5)), expected)


@pytest.mark.parametrize("forward", WITH_CHAINS.values(), ids=WITH_CHAINS)
def test_chains_go_on_where_nothing_outside_is_differentiated_through(forward):
    net = mfx.momentumize(make(forward), gamma=0.5)
    net(torch.ones(3, WIDTH, requires_grad=True))
    assert sum(len(chain.steps) for chain in mfx.explain(net).chains) >= DEPTH


@pytest.mark.parametrize("forward", OUTSIDE.values(), ids=OUTSIDE)
def test_a_step_that_differentiates_through_others_is_left_alone(forward):
    net = mfx.momentumize(make(forward), gamma=0.0, min_steps=1)
    net(torch.ones(3, WIDTH, requires_grad=True))
    reasons = [rejection.reason for rejection in mfx.explain(net).rejections]
    assert any("differentiates in the branch through what lies outside of it" in reason for reason in reasons)
