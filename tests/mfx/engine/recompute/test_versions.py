"""Versions of tables: new with every write, and nothing but a shorter way to the same answers."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import mfx
from mfx.compat import version_reader, words

WRITES = {
    "attribute": lambda module: setattr(module, "scale", object()),
    "attribute of the table": lambda module: module.__dict__.update(scale=object()),
    "another attribute": lambda module: setattr(module, "other", None),
    "deletion": lambda module: delattr(module, "scale"),
    "flag": lambda module: module.eval(),
    "table replaced": lambda module: setattr(module, "_forward_hooks", OrderedDict()),
    "renamed": lambda module: module.__dict__.update(other=module.__dict__.pop("scale")),
    "replaced by an equal one": lambda module: module.__dict__.update(scale=[1]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_gives_a_new_version(write):
    module = nn.Linear(2, 2)
    module.scale = [1]
    read = version_reader([module.__dict__, module._parameters])
    before = read()
    module(torch.ones(2))
    assert read() == before
    write(module)
    assert read() != before


def test_a_parameter_that_is_replaced_gives_a_new_version():
    module = nn.Linear(2, 2)
    read = version_reader([module.__dict__, module._parameters])
    before = read()
    module.weight = nn.Parameter(module.weight.detach().clone())
    assert read() != before


def test_versions_of_other_tables_are_never_equal(monkeypatch):
    read = version_reader([{}, OrderedDict(a=1)])
    assert read() != read()
    monkeypatch.setattr(words, "_VERSION", 0)
    read = version_reader([{}])
    assert read() != read()


def test_another_class_or_dictionary_of_an_object_is_told():
    module = nn.Linear(2, 2)
    read = version_reader([], [module])
    before = read()
    module.scale = 1.0
    module(torch.ones(2))
    assert read() == before
    module.__class__ = type("Other", (nn.Linear,), {})
    assert read() != before
    module.__class__ = nn.Linear
    assert read() == before
    module.__dict__ = dict(module.__dict__)
    assert read() != before


class Counting(nn.Module):
    """A branch that counts its calls, and from the third on keeps the last value."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls, self.last = 0, None

    def forward(self, x):
        self.calls += 1
        y = torch.tanh(self.linear(x)) * self.calls
        if self.calls > 2:
            y = y if self.last is None else y + 0.1 * self.last
            self.last = y.detach()
        return y


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(Counting() for _ in range(3))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.mark.parametrize("has_versions", [True, False])
def test_state_is_followed_with_versions_and_without(has_versions, monkeypatch):
    if not has_versions:
        monkeypatch.setattr(words, "_VERSION", 0)
    torch.manual_seed(0)
    plain = Net()
    net = mfx.momentumize(Net(), gamma=0.0)
    net.load_state_dict(plain.state_dict())
    for number in range(5):
        x = torch.randn(2, 4)
        if number == 3:
            for model in (plain, net):
                model.branches[1].calls = 7
        for model in (plain, net):
            model.zero_grad()
            loss = model(x).sum()
            if number == 4:
                model.branches[0].calls = -1  # between forward and backward
            loss.backward()
        for one, other in zip(plain.parameters(), net.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        for one, other in zip(plain.branches, net.branches, strict=True):
            assert one.calls == other.calls
            assert (one.last is None) == (other.last is None)
