"""Attributes of classes that change between calls and in them: a net finds them as the model does."""

import copy
import pickle
from functools import singledispatchmethod

import pytest
import torch
from torch import nn

import mfx
from mfx.capture.class_guards import ClassGuard

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
CAPTURES = ["auto", pytest.param("dynamo", marks=pytest.mark.zoo)]


class Root:
    calls = 0


class Plain(Root):
    scale, table = 1.0, {"a": 1.0}

    def read(self):
        return self.scale


class Base(nn.Module):
    calls, factor, unused = 0, 1.0, None
    kinds = [Plain]  # noqa: RUF012
    numbers, deep = [1.0] * 100, {"a": {"b": {"c": {"d": 1.0}}}}


class Block(Base):
    scale, table = 1.0, {"a": 1.0}

    def __init__(self, computes):
        super().__init__()
        self.linear, self.config, self.kind, self.computes = nn.Linear(4, 4), Plain(), Plain, computes

    def double(self, x):
        return x

    @property
    def weight(self):
        return 1.0

    @staticmethod
    def shift(x):
        return x

    def forward(self, x):
        return x + self.computes(self, self.linear(x).tanh())


class Model(nn.Module):
    def __init__(self, computes):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(computes) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


CLASSES = {cls: dict(vars(cls)) for cls in (Root, Plain, Base, Block)}


def _put_back():
    for cls, attributes in CLASSES.items():
        for name in vars(cls).keys() - attributes.keys():
            delattr(cls, name)
        for name, value in attributes.items():
            if vars(cls).get(name, _put_back) is not value:
                setattr(cls, name, value)
    Plain.table["a"] = Block.table["a"] = Base.numbers[1] = Base.deep["a"]["b"]["c"]["d"] = 1.0


@pytest.fixture(autouse=True)
def _classes_put_back():
    yield
    _put_back()


PLAIN = Plain()


def _one_for_another():
    del Base.unused
    Base.later = 2.0


def _of_base(block, x):
    return block.extra(x) if hasattr(block, "extra") else x


def _forward_with_more(block, x):
    return x + 2 * block.linear(x).tanh()


def _getattr_with_more(block, name):
    return 2.0 if name == "later" else nn.Module.__getattr__(block, name)


# What a branch computes, and a change of a class that it sees.
CHANGED = {
    "an attribute": (lambda b, x: x * b.scale, lambda: setattr(Block, "scale", 2.0)),
    "an attribute of the class": (lambda b, x: x * type(b).scale, lambda: setattr(Block, "scale", 2.0)),
    "one of a base": (lambda b, x: x * b.factor, lambda: setattr(Base, "factor", 2.0)),
    "one in front of a base's": (lambda b, x: x * b.factor, lambda: setattr(Block, "factor", 2.0)),
    "a new one": (lambda b, x: x * getattr(b, "later", 1.0), lambda: setattr(Block, "later", 2.0)),
    "whether there is one": (lambda b, x: x * (1 + hasattr(b, "later")), lambda: setattr(Base, "later", 2.0)),
    "a container": (lambda b, x: x * b.table["a"], lambda: Block.table.update(a=2.0)),
    "a method": (lambda b, x: b.double(x), lambda: setattr(Block, "double", lambda block, x: 2 * x)),
    "a new method": (_of_base, lambda: setattr(Base, "extra", lambda block, x: 2 * x)),
    "a static method": (lambda b, x: b.shift(x), lambda: setattr(Block, "shift", staticmethod(lambda x: x + 1))),
    "a property": (lambda b, x: x * b.weight, lambda: setattr(Block, "weight", property(lambda block: 2.0))),
    "the forward": (lambda b, x: x, lambda: setattr(Block, "forward", _forward_with_more)),
    "what is looked up": (
        lambda b, x: x * getattr(b, "later", 1.0),
        lambda: setattr(Block, "__getattr__", _getattr_with_more),
    ),
    "an object's class": (lambda b, x: x * b.config.scale, lambda: setattr(Plain, "scale", 2.0)),
    "a container there": (lambda b, x: x * b.config.table["a"], lambda: Plain.table.update(a=2.0)),
    "a method there": (lambda b, x: x * b.config.read(), lambda: setattr(Plain, "read", lambda plain: 2.0)),
    "a constant by a computed name": (
        lambda b, x: x * getattr(b, "".join(["sc", "ale"])),
        lambda: setattr(Block, "scale", 2.0),
    ),
    "a long table": (lambda b, x: x * b.numbers[1], lambda: Base.numbers.__setitem__(1, 2.0)),
    "a deep table": (lambda b, x: x * b.deep["a"]["b"]["c"]["d"], lambda: Base.deep["a"]["b"]["c"].update(d=2.0)),
    "a class that is held": (lambda b, x: x * b.kind.scale, lambda: setattr(Plain, "scale", 2.0)),
    "a class that a class holds": (lambda b, x: x * b.kinds[0].scale, lambda: setattr(Plain, "scale", 2.0)),
    "the class of a global object": (lambda b, x: x * PLAIN.scale, lambda: setattr(Plain, "scale", 2.0)),
    "a name for another": (lambda b, x: x * getattr(b, "later", 1.0), _one_for_another),
    "a new one there": (lambda b, x: x * getattr(b.config, "later", 1.0), lambda: setattr(Root, "later", 2.0)),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("computes", "change"), CHANGED.values(), ids=CHANGED)
def test_a_change_between_two_calls_is_seen(computes, change, capture):
    model = Model(computes)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    before = model(X)
    assert torch.equal(net(X), before)
    change()
    assert not torch.equal(model(X), before)
    assert torch.equal(net(X), model(X))


def _on_class(block, x):
    Block.calls += 1
    return x * block.calls


def _on_base(block, x):
    Base.calls += 1
    return x * block.calls


def _by_type(block, x):
    type(block).calls += 1
    return x * block.calls


def _on_class_of_object(block, x):
    Plain.calls += 1
    return x * block.config.calls


def _on_base_of_object(block, x):
    Root.calls += 1
    return x * block.config.calls


def _read_by_derived_class(block, x):
    Root.calls += 1
    return x * Plain.calls


def _read_before_and_after(block, x):
    before = block.config.calls
    Plain.calls += 1
    return x * before + block.config.calls


def _asked_for(block, x):
    Plain.later = 1.0
    return x * (1 + hasattr(block.config, "later"))


def _method(block, x):
    Plain.read = lambda plain: 2.0
    return x * block.config.read()


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(
    "computes",
    [
        _on_class,
        _on_class_of_object,
        _read_by_derived_class,
        _asked_for,
        *(
            pytest.param(computes, marks=pytest.mark.zoo)
            for computes in (_on_base, _by_type, _on_base_of_object, _read_before_and_after)
        ),
    ],
    ids=lambda computes: computes.__name__[1:],
)
def test_what_a_call_sets_on_a_class_is_read_in_it(computes, capture):
    """TorchDynamo, which is asked for it, reads what the class held before."""
    model = Model(computes)
    expected = [model(X) for _ in range(3)]
    counts = [cls.calls for cls in CLASSES]
    _put_back()
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    assert all(torch.equal(net(X), result) for result in expected)
    assert [cls.calls for cls in CLASSES] == counts


@pytest.mark.filterwarnings("ignore:mfx. Model cannot be captured as one graph")
def test_a_method_that_a_call_sets_on_a_class_is_called_in_it():
    model = Model(_method)
    net = mfx.momentumize(model, gamma=0.0)
    result, read = net(X), Plain.read
    assert torch.equal(result, model(X))
    assert read(None) == 2.0


def _checking(least):
    bounds = [lambda x: x > least]

    def check(x):
        return all(bound(x) for bound in bounds)

    return check


class Checked:
    checks = {"scale": [_checking(1), [_checking(2)]], "count": [_checking(0)]}  # noqa: RUF012


def test_a_guard_holds_for_functions_in_containers_and_functions():
    guard = ClassGuard.of(Checked, frozenset({"checks", "scale", "bounds"}))
    assert guard.holds()
    Checked.checks["count"].append(_checking(3))
    assert not guard.holds()
    del Checked.checks["count"][-1]
    assert guard.holds()


@pytest.mark.parametrize("name", ["scale", "table"])
def test_a_guard_that_was_saved_does_not_hold_for_other_values(name):
    guard = pickle.loads(pickle.dumps(ClassGuard.of(Plain, frozenset({"scale", "table", "read"}))))
    assert guard.holds()
    saved = pickle.dumps(guard)
    setattr(Plain, name, {"a": 2.0} if name == "table" else 2.0)
    assert not guard.holds()
    assert not pickle.loads(saved).holds()


def _described(make_base):
    class Lazy:
        def __init__(self, compute):
            self.compute = compute

        def __get__(self, value, kind=None):
            return self.compute(value)

    class Described(make_base(), nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*(Block(_of_base) for _ in range(3)))

        @Lazy
        def compute(self):
            return 2.0

        @singledispatchmethod
        def asked(self, x):
            return x

        def forward(self, x):
            return self.blocks(self.asked(x)) * self.compute

    return Described


def _mixin():
    class Mixin:
        pass

    return Mixin


Described = _described(_mixin)
Described.__qualname__ = "Described"


def test_a_net_is_saved_whatever_its_class_holds():
    model = Described()
    net = mfx.momentumize(model, gamma=0.0)
    expected = net(X)
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), expected)
    assert torch.equal(copy.deepcopy(net)(X), expected)


class Slots:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 2


def test_an_object_with_slots_is_no_place_of_what_a_class_holds():
    """TorchDynamo reads the object's own, whatever the call has set on another class under this name."""
    held = Slots()

    def computes(block, x):
        Block.calls += 1
        return x * held.calls

    model = Model(computes)
    expected = model(X)
    _put_back()
    assert torch.equal(mfx.momentumize(model, gamma=0.0)(X), expected)
