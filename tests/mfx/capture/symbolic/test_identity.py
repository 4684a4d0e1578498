"""Questions of a model about the objects that its values are: a net answers alike, or its trace is refused."""

import copy

import pytest
import torch
from torch import nn

import mfx
from mfx.capture.binding import ByName
from mfx.capture.symbolic.bytecode import identity_checks

WIDTH = 4
MISSING = object()


def same(a, b):
    return a is b


class Kinds:
    A, B = object(), object()


class Model(nn.Module):
    def __init__(self, asked):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.kind, self.fallback, self.asked = "a", "b", asked

    def run(self, x):
        for fc in self.fc:
            x = x + fc(x).tanh()
        return x

    def is_mine(self, a, b):
        return a is b


def _forward(model, x, y):
    return model.run(x * y if model.asked(model, x, y) else x)


def _by_position(model, x, y, /):
    return model.run(x * y)


def _inplace(model, x, y):
    changed = (z := x * 2).relu_()
    return changed is z


ASKED = {
    "arguments": lambda model, x, y: x is y,
    "not": lambda model, x, y: x is not y,
    "no copy": lambda model, x, y: x.contiguous() is x,
    "changed in place": _inplace,
    "in a function": lambda model, x, y: same(x, y),
    "in a method": lambda model, x, y: model.is_mine(x, y),
    "in a generator": lambda model, x, y: any(x is value for value in (y,)),
    "after a conditional": lambda model, x, y: x is (x if model.training else y),
    "grad_fn": lambda model, x, y: x.grad_fn is None,
    "grad": lambda model, x, y: model.fc[0].weight.grad is None,
    "version": lambda model, x, y: (z := x.clone())._version == z.add_(1)._version,
    "leaf": lambda model, x, y: x.is_leaf,
}
KNOWN = {
    "None": lambda model, x, y: x is not None,
    "constant": lambda model, x, y: model.training is True,
    "global": lambda model, x, y: x is MISSING,
    "attribute of a global": lambda model, x, y: x is Kinds.A,
    "class": lambda model, x, y: type(x) is type(y),
    "__class__": lambda model, x, y: x.__class__ is y.__class__,
    "truth values": lambda model, x, y: (x is None) is (y is None),
    "held": lambda model, x, y: model.kind is model.fallback,
    "held modules": lambda model, x, y: model.fc is model.fc[0],
    "held parameters": lambda model, x, y: model.fc[0].weight is model.fc[1].weight,
    "callable": lambda model, x, y: callable(x),
}


def check(model, *calls):
    """Check a net against its model, and return the routes of its graphs."""
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for args in calls:
        outputs = [each(*args) for each in (net, model)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.sum().backward()
    for p, q in zip(net.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    return [type(graph.captured.binding) for graph in net.__dict__["forward"].table.graphs]


def model_with(forward, asked=None):
    return type("Asking", (Model,), {"forward": forward})(asked)


def calls():
    x, y = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    return (x, x), (x, y)


@pytest.mark.filterwarnings("ignore:mfx:UserWarning")  # Dynamo has no versions
@pytest.mark.parametrize("asked", ASKED)
def test_what_a_trace_does_not_know_is_asked_of_dynamo(asked):
    torch._dynamo.reset()
    assert ByName not in check(model_with(_forward, ASKED[asked]), *calls())


@pytest.mark.parametrize("asked", KNOWN)
def test_what_a_trace_knows_is_not_refused(asked):
    assert set(check(model_with(_forward, KNOWN[asked]), *calls())) == {ByName}


def test_a_refusal_names_the_line():
    with pytest.raises(mfx.MfxError, match=r"two values are one object .*test_identity.py:\d+, in same: return a is b"):
        mfx.trace(model_with(lambda model, x, y: model.run(x * 2 if same(x, y) else x)))


def test_the_identity_of_a_traced_value_is_refused():
    with pytest.raises(mfx.MfxError, match="identity of a traced value"):
        mfx.trace(model_with(lambda model, x, y: model.run(x * 2 if id(x) == id(y) else x)))


def test_positional_only_arguments():
    model, (same_twice, others) = model_with(_by_position), calls()
    assert check(model, same_twice, others) == [ByName]
    net = mfx.momentumize(model, gamma=0.0)
    net(*others)
    for _ in range(2):
        with pytest.raises(TypeError, match="positional"):
            net(others[0], y=others[1])


@pytest.mark.parametrize("text", ["a is b", "a() is b", "f(a, b=c).d is b", "a[0] is not b[c]", "a is (b if c else d)"])
def test_checks_are_found(text):
    source = f"def function(self, a, b, c, d, f):\n    return (\n        {text})\n"
    (check,) = identity_checks(compile(source, "text", "exec"))
    assert check[:2] == (3, ((), ()))


@pytest.mark.parametrize("text", ["a is None", "A.b.c is b", "type(f(a)) is b", "(a in b) is c", "a is Ellipsis"])
def test_checks_of_constants_are_not_found(text):
    source = f"def function(self, a, b, c, d, f):\n    return {text}\n"
    assert not identity_checks(compile(source, "text", "exec"))


def test_paths_from_the_first_argument_are_found():
    source = "def function(self, a):\n    return self.b[0].c is self.d, self is a\n"
    assert [check.paths for check in identity_checks(compile(source, "text", "exec"))] == [
        (("b", 0, "c"), ("d",)),
        ((), ()),
    ]
