"""A graph holds as long as the attributes that the model's code reads are what they were, whatever they are."""

import collections
import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

import mfx
from mfx.capture.module_guards import guards_of

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x)


class Model(nn.Module):
    def __init__(self, forward, held=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.computes = forward
        if held is not None:
            self.held = held(self)

    def forward(self, x):
        return self.computes(self, x)

    def run(self, x, blocks=None):
        for block in self.blocks if blocks is None else blocks:
            x = block(x)
        return x


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


class Slots:
    __slots__ = ("factor",)


def with_slots(model):
    slots = Slots()
    slots.factor = 1.0
    return slots


def with_cell(model):
    factors = [2.0]

    def scale(x):
        return x * factors[0]

    scale.factors = factors
    return scale


def with_default(model):
    def scale(x, factor=2.0):
        return x * factor

    return scale


def by_key(model, x):
    return model.run(x) * model.held["factor"]


def by_number(model, x):
    return model.run(x) * model.held[0]


def by_listed(model, x):
    return model.run(x, model.held)


def by_order(model, x):
    return model.run(x, [model.blocks[index] for index in model.held])


def called(model, x):
    return model.held(model.run(x))


def with_factor(model):
    model.held["factor"] = 2.0


def set_held(make):
    return lambda model: setattr(model, "held", make())


CHANGES = {
    "tensor in a dictionary": (by_key, lambda m: {"factor": 1.0, "t": torch.ones(4)}, with_factor),
    "module in a dictionary": (by_key, lambda m: {"factor": 1.0, "m": nn.ReLU()}, with_factor),
    "set in a dictionary": (by_key, lambda m: {"factor": 1.0, "s": {1}}, with_factor),
    "class in a dictionary": (by_key, lambda m: {"factor": 1.0, "c": nn.ReLU}, with_factor),
    "OrderedDict": (by_key, lambda m: collections.OrderedDict(factor=1.0), with_factor),
    "defaultdict": (by_key, lambda m: collections.defaultdict(float, factor=1.0), with_factor),
    "tensor in a list": (by_number, lambda m: [1.0, torch.ones(4)], lambda m: m.held.__setitem__(0, 2.0)),
    "modules reversed": (by_listed, lambda m: list(m.blocks), lambda m: m.held.reverse()),
    "module removed": (by_listed, lambda m: list(m.blocks), lambda m: m.held.pop()),
    "set": (by_order, lambda m: {0, 1, 2}, lambda m: m.held.discard(1)),
    "range": (by_order, lambda m: range(3), set_held(lambda: range(2))),
    "deque": (by_order, lambda m: collections.deque([0, 1, 2]), lambda m: m.held.rotate(1)),
    "array": (by_order, lambda m: np.array([0, 1, 2]), lambda m: m.held.__setitem__(0, 2)),
    "key beside a module": (by_order, lambda m: {0: None, 1: nn.ReLU(), 2: 0}, lambda m: m.held.pop(1)),
    "many numbers": (by_order, lambda m: [0, 1, 2] * 40, lambda m: m.held.reverse()),
    "slice": (
        lambda m, x: m.run(x, m.blocks[m.held]),
        lambda m: slice(0, 3),
        set_held(lambda: slice(0, 2)),
    ),
    "scalar of numpy": (
        lambda m, x: m.run(x) * float(m.held),
        lambda m: np.float32(1),
        set_held(lambda: np.float32(2)),
    ),
    "minus zero": (
        lambda m, x: torch.copysign(m.run(x), torch.full((4,), m.held)),
        lambda m: 0.0,
        set_held(lambda: -0.0),
    ),
    "list in an object": (
        lambda m, x: m.run(x) * m.held.factors[0],
        lambda m: Holder(factors=[1.0]),
        lambda m: m.held.factors.__setitem__(0, 2.0),
    ),
    "slots": (lambda m, x: m.run(x) * m.held.factor, with_slots, lambda m: setattr(m.held, "factor", 2.0)),
    "keywords of a partial": (
        called,
        lambda m: functools.partial(torch.mul, other=2),
        lambda m: m.held.keywords.update(other=7),
    ),
    "closure": (called, with_cell, lambda m: m.held.factors.__setitem__(0, 4.0)),
    "defaults": (called, with_default, lambda m: setattr(m.held, "__defaults__", (5.0,))),
}


def in_dict(model, x):
    return model.run(x) * (3 if "added" in model.__dict__ else 2)


def tried(model, x):
    try:
        factor = model.added
    except AttributeError:
        factor = 2
    return model.run(x) * factor


ASKS = {
    "getattr": lambda m, x: m.run(x) * getattr(m, "added", 2),
    "hasattr": lambda m, x: m.run(x) * (3 if hasattr(m, "added") else 2),
    "in the dictionary": in_dict,
    "try": tried,
}


def compare(model, net):
    with torch.no_grad():
        assert torch.equal(net(X), model(X))


def graphs_of(net):
    return net.__dict__["forward"].table.graphs


@pytest.mark.parametrize("name", CHANGES)
def test_changed(name):
    forward, held, change = CHANGES[name]
    model, net = Model(forward, held), mfx.momentumize(Model(forward, held), gamma=0.0, capture="symbolic")
    compare(model, net)
    compare(model, net)
    assert len(graphs_of(net)) == 1
    change(model)
    change(net)
    compare(model, net)


@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize("value", [3, nn.Parameter(torch.full((4,), 3.0))], ids=["number", "parameter"])
def test_added(name, value):
    model, net = Model(ASKS[name]), mfx.momentumize(Model(ASKS[name]), gamma=0.0, capture="symbolic")
    compare(model, net)
    model.added = net.added = value
    compare(model, net)
    del model.added, net.added
    compare(model, net)
    assert len(graphs_of(net)) == 2  # the first one serves again


class Counting:
    def __init__(self):
        self.seen = []


def test_what_nobody_mentions_may_change():
    net = mfx.momentumize(Model(lambda model, x: model.run(x) * 2), gamma=0.0, capture="symbolic")
    net.of_trainer_metrics, net.of_trainer_callback, net.of_trainer_latest = (
        [torch.ones(())],
        Counting(),
        {"loss": torch.ones(())},
    )
    with torch.no_grad():
        net(X)
        for step in range(3):
            net.of_trainer_metrics.append(torch.ones(()))
            net.of_trainer_callback.seen.append(step)
            net.of_trainer_latest = {"loss": torch.ones(()), "step": step}
            setattr(net, f"of_trainer_step_{step}", step)
            net(X)
    assert len(graphs_of(net)) == 1


def test_what_the_forward_changes_may_change():
    model, names = Model(by_listed, lambda m: list(m.blocks)), frozenset({"held", "added", "asked"})
    guards = guards_of(model, (), {model: {"held", "added"}}, names)
    model.held.pop()
    model.added = 1
    assert all(guard.holds() for guard in guards)
    model.asked = 1
    assert not all(guard.holds() for guard in guards)


def test_a_copy_has_guards_of_its_own():
    net = mfx.momentumize(Model(by_listed, lambda m: list(m.blocks)), gamma=0.0, capture="symbolic")
    model = Model(by_listed, lambda m: list(m.blocks))
    compare(model, net)
    copied = copy.deepcopy(net)
    compare(model, copied)
    copied.held.pop()
    compare(model, net)
    model.held.pop()
    compare(model, copied)


def test_a_container_may_be_in_itself():
    def held(model):
        table = {"scale": 2.0}
        table["self"] = table
        return table

    model = Model(lambda model, x: model.run(x * model.held["self"]["scale"]), held)
    net = mfx.momentumize(model, gamma=0.0)
    assert torch.equal(net(X), model(X))
    model.held["scale"] = net.held["scale"] = 3.0
    assert torch.equal(net(X), model(X))
