"""Tensors that a forward makes, or reads from outside of its model: part of the graph, not left on the net."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn

import mfx
from tests.sampling import grid

TABLE = torch.tensor([1.0, 2.0, 3.0, 4.0])


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc(x * torch.tensor([1.0, 2.0, 3.0, 4.0]))


class Global(Constant):
    def forward(self, x):
        return x + self.fc(x * TABLE)


class Reads(Constant):  # is called as a whole
    def forward(self, x):
        scale = x * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return x + self.fc(scale * float(torch.ones(1).item()))


class Decides(Constant):
    def forward(self, x):
        if x.sum() > 0:
            x = x * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return x + self.fc(x * torch.tensor([1.0, 1.0, 3.0, 4.0]))


class Draws(Constant):  # runs as written
    def forward(self, x):
        return x + self.fc(x * torch.tensor([1.0, 2.0, 3.0, 4.0])) * random.random()


SHOWN = {"forward", "mfx_mark", "graph", "code", "print_readable", "extra_repr"}  # what mfx puts there for people


def model_of(block):
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(3)))


def held(module):
    return {path: set(inner.__dict__) - SHOWN for path, inner in module.named_modules()}


@pytest.mark.filterwarnings("ignore:mfx")
@grid(
    5,
    block={block.__name__: block for block in (Constant, Global, Reads, Decides, Draws)},
    capture=["auto", "symbolic", "dynamo"],
)
def test_nothing_is_left_on_net_or_model(block, capture):
    model, x = model_of(block), torch.randn(2, 4)
    before = held(model)
    net = model
    try:
        net = mfx.momentumize(model, gamma=0.0, capture=capture)
        for training in (True, False):
            for size in (2, 3):
                net.train(training)(torch.randn(size, 4)).sum().backward()
        mfx.explain(net, x)
        mfx.explain(model, x)
    except mfx.MfxError:
        assert capture != "auto"  # a trace that fails leaves nothing either
    assert held(model) == before
    assert held(net) == before
    assert net is not model or capture != "auto"
    assert list(net.state_dict()) == list(model.state_dict())
    assert not list(net.named_buffers())


def test_they_have_their_values_in_traces_and_copies():
    model, x = model_of(Constant), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0)
    expected = model(x)
    for run in (net, mfx.trace(model), copy.deepcopy(net), pickle.loads(pickle.dumps(net)), *mfx.graphs(net).values()):
        assert torch.equal(run(x), expected)


def test_a_name_of_the_models_own_is_another():
    model, x = model_of(Constant), torch.randn(2, 4)
    model.tensor_constants = nn.Identity()
    assert torch.equal(mfx.momentumize(model, gamma=0.0)(x), model(x))


def test_a_copy_reads_the_tensor_that_is_outside(monkeypatch):
    monkeypatch.setitem(globals(), "TABLE", TABLE.clone())
    model, x = model_of(Global), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0)
    net(x)
    copied, plain = copy.deepcopy(net), copy.deepcopy(model)
    TABLE.mul_(2)
    assert torch.equal(copied(x), plain(x))


class Computes(nn.Module):
    """Computes with tensors that are no buffers, and with a view of a buffer, before it meets a traced value."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), torch.ones(4)
        self.register_buffer("shift", torch.ones(4))
        self.part = self.shift[:2]

    def forward(self, x):
        return x + self.fc(x * (self.scale * 2) + self.part.sum() + (TABLE * 2).sum())


CHANGES = {
    "in place": lambda net: net[0].scale.mul_(3),
    "by another": lambda net: setattr(net[0], "scale", torch.full((4,), 5.0)),
    "through a buffer": lambda net: net[0].shift.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_they_were_computed_from_is_seen(change):
    model, x = model_of(Computes), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0)
    assert torch.equal(net(x), model(x))
    before = model(x)
    for each in (net, model) if change is not CHANGES["through a buffer"] else (model,):  # which they share
        change(each)
    assert not torch.equal(model(x), before)
    assert torch.equal(net(x), model(x))


def test_a_change_of_a_global_that_they_were_computed_from_is_seen(monkeypatch):
    monkeypatch.setitem(globals(), "TABLE", TABLE.clone())
    model, x = model_of(Computes), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0)
    net(x)
    TABLE.mul_(3)
    assert torch.equal(net(x), model(x))
