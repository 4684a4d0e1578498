"""Copies of a net that share values of its ``__dict__``: each runs its own modules."""

import copy
import gc
import pickle
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import fx, nn
from torch._dynamo.exc import Unsupported

import mfx
from mfx.modules.overlay import MARK
from tests.mfx.models import Stack, inputs
from tests.sampling import grid


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.body = nn.Sequential(*(Block() for _ in range(3)))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.body(self.stem(x) * self.scale)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh())

    def forward(self, x):
        return x + self.f(x)


class Decoded(Net):
    """Not one graph."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.sum().item() > -1e9 else -y


def tables(module: nn.Module) -> nn.Module:
    """Copy modules and tensors by copying every ``__dict__``, as libraries for meta-learning do."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {name: None if p is None else p.clone() + 0.1 for name, p in module._parameters.items()}
    clone._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    clone._modules = {name: None if child is None else tables(child) for name, child in module._modules.items()}
    return clone


def by_attributes(module: nn.Module) -> nn.Module:
    clone = type(module)()
    for name, value in vars(module).items():
        if not name.startswith("_"):
            setattr(clone, name, value)
    return clone


def shallow(module: nn.Module) -> nn.Module:
    other = copy.copy(module)
    other._modules = copy.deepcopy(module)._modules
    with torch.no_grad():
        for child in other.children():
            for parameter in child.parameters():
                parameter.add_(0.1)
    return other


def subclassed(module: nn.Module) -> nn.Module:
    clone = tables(module)
    clone.__class__ = type("Fast", (type(module),), {})
    return clone


def overridden(module: nn.Module) -> nn.Module:
    clone = tables(module)
    clone.__class__ = type(
        "Twice", (type(module),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)}
    )
    return clone


def replica(module: nn.Module) -> nn.Module:
    """Copy as `torch.nn.DataParallel` does: what were parameters are plain tensors."""
    copies = {inner: inner._replicate_for_data_parallel() for inner in module.modules()}
    for inner, copied in copies.items():
        for name, child in inner._modules.items():
            copied._modules[name] = copies[child]
        for name, parameter in inner._parameters.items():
            setattr(copied, name, None if parameter is None else parameter * 1.5)
    return copies[module]


COPIES = {f.__name__: f for f in (shallow, tables, by_attributes, subclassed, overridden, replica)}
NETS = {"one graph": Net, "module by module": Decoded}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def x_of(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:mfx. .* cannot be captured")
@grid(8, make=COPIES, build=NETS, called={"fresh": False, "called": True})
def test_a_copy_runs_its_own_modules(make: Callable, build: type, called: bool):
    model = build()
    net = mfx.momentumize(model, gamma=0.0)
    before = net(x_of()) if called else model(x_of())
    torch.manual_seed(2)
    copied = make(net)
    torch.manual_seed(2)
    expected = make(model)
    for _ in range(2):
        assert torch.equal(copied(x_of()), expected(x_of()))
        assert torch.equal(net(x_of()), before)
    assert not torch.equal(copied(x_of()), before) or make is by_attributes


@pytest.mark.parametrize("make", [shallow, tables, subclassed])
def test_it_is_a_momentum_net_with_a_gamma_of_its_own(make):
    net = mfx.momentumize(Net(), gamma=0.5)
    copied = make(net)
    plain = Net()
    plain.load_state_dict(copied.state_dict())
    expected = mfx.momentumize(plain, gamma=0.5)(x_of())
    assert torch.equal(copied(x_of()), expected)
    mfx.set_gamma(copied, 0.0)
    assert torch.equal(copied(x_of()), plain(x_of()))
    assert [chain.gamma for chain in mfx.explain(net).chains] == [0.5]
    assert [chain.gamma for chain in mfx.explain(copied).chains] == [0.0]


def test_gradients_reach_the_tensors_that_it_was_made_of():
    model = Net()
    net = mfx.momentumize(model, gamma=0.0)
    gradients = []
    for each in (model, net):
        clone = tables(tables(each))
        gradients.append(torch.autograd.grad(clone(x_of()).square().sum(), list(each.parameters())))
    assert all(map(torch.equal, *gradients))


def test_what_is_asked_of_a_copy_that_was_never_called_is_answered_of_the_copy():
    net = mfx.momentumize(Net(), gamma=0.5)
    copied = tables(net)
    mfx.set_gamma(copied, 0.25)
    assert [chain.gamma for chain in mfx.explain(net).chains] == [0.5]
    (graph,) = mfx.graphs(copied).values()
    assert graph.body is copied.body


def test_the_graph_of_a_net_is_that_of_its_copies():
    net = mfx.momentumize(Net(), gamma=0.0)
    expected = net(x_of())
    copies = [copy.deepcopy(net), copy.deepcopy(copy.deepcopy(net)), pickle.loads(pickle.dumps(net)), copy.copy(net)]
    with mock.patch.object(fx.Tracer, "trace", side_effect=AssertionError("captured once more")):
        assert all(torch.equal(each(x_of()), expected) for each in copies)


@pytest.mark.parametrize("compiled", [False, True], ids=["fresh", "original compiled"])
@pytest.mark.parametrize("kind", [Net, Decoded])
@pytest.mark.filterwarnings("ignore")  # of the call that is refused, and of what is not one graph
def test_a_copy_that_compiled_code_calls_first(kind, compiled):
    torch.compiler.reset()
    model = kind()
    net = mfx.momentumize(model, gamma=0.0)
    function = torch.compile(lambda module, x: module(x), backend="eager")
    if compiled:
        function(net, x_of())
    mine, theirs = tables(net), tables(model)
    if compiled and kind is Decoded:  # no compiler looks at the call again, so it is refused once
        with pytest.raises(mfx.MfxError, match="call it again: from now on the copy has a forward of its own"):
            function(mine, x_of())
    assert torch.equal(function(mine, x_of()), theirs(x_of()))
    assert torch.equal(function(net, x_of()), model(x_of()))


@pytest.mark.parametrize("kind", [Net, Decoded])
def test_compiled_code_does_not_guess_which_of_two_is_meant(kind):
    torch.compiler.reset()
    mine = tables(mfx.momentumize(kind(), gamma=0.0))
    function = torch.compile(mine, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="it is not known which of the two is meant"), pytest.raises(Unsupported):
        function(x_of())


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("path", ["body", "body.1", "body.1.f", "stem"])
def test_a_submodule_alone(path, called):
    model = Net()
    net = mfx.momentumize(model, gamma=0.0)
    if called:
        net(x_of())
    mine, theirs = tables(net.get_submodule(path)), tables(model.get_submodule(path))
    assert torch.equal(mine(x_of()), theirs(x_of()))
    assert torch.equal(net.get_submodule(path)(x_of()), model.get_submodule(path)(x_of()))
    assert torch.equal(net(x_of()), model(x_of()))


@pytest.mark.parametrize("path", ["body", "body.1"])
def test_a_deepcopy_of_a_submodule_does_not_copy_the_net(path):
    net = mfx.momentumize(Net(), gamma=0.0)
    net(x_of())
    gc.collect()
    count = sum(type(o) is Net for o in gc.get_objects())
    copied = copy.deepcopy(net.get_submodule(path))
    assert torch.equal(copied(x_of()), net.get_submodule(path)(x_of()))
    assert sum(type(o) is Net for o in gc.get_objects()) == count


def test_a_forward_called_by_itself_is_refused_while_it_is_not_known_whose_it_is():
    model = Net()
    net = mfx.momentumize(model, gamma=0.0)
    copied = tables(net)
    for each in (copied, net):
        other = tables(each)
        with pytest.raises(mfx.MfxError, match=r"forward of a Net was called by itself, and there is a copy.*net\(x\)"):
            other.forward(x_of())
        assert torch.equal(each.forward(x_of()), each(x_of()))
    assert torch.equal(net.forward(x_of()), model(x_of()))
    assert not torch.equal(copied.forward(x_of()), model(x_of()))


def test_a_forward_lent_to_another_module_runs_the_net():
    net = mfx.momentumize(Net(), gamma=0.0)
    outer = Net()
    outer.forward = net.forward
    assert torch.equal(outer(x_of()), net(x_of()))


def test_hooks_and_tracing_around_a_copy():
    net = mfx.momentumize(Net(), gamma=0.0)
    copied = tables(net)
    seen = []
    copied._forward_hooks = type(copied._forward_hooks)()
    copied.register_forward_hook(lambda module, args, output: seen.append(module))
    plain = Net()
    plain.load_state_dict(copied.state_dict())
    assert torch.equal(copied(x_of()), plain(x_of()))
    assert seen == [copied]


def test_the_class_of_a_net_rebound():
    model, net = Net(), None
    net = mfx.momentumize(model, gamma=0.0)
    for called in (False, True):
        if called:
            net(x_of())
        cls = type(net)
        net.__class__ = type("Twice", (Net,), {"forward": lambda self, x: 2 * Net.forward(self, x)})
        assert torch.equal(net(x_of()), 2 * model(x_of()))
        net.__class__ = cls
        assert torch.equal(net(x_of()), model(x_of()))


def test_the_mark_comes_and_goes_with_the_forward():
    net = mfx.momentumize(Stack())
    assert MARK in net.__dict__
    net(inputs())
    (graph,) = mfx.graphs(net).values()
    again = mfx.momentumize(net)
    assert again.__dict__[MARK] is not net.__dict__[MARK]
    assert MARK not in graph.__dict__
