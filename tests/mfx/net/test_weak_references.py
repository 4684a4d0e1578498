"""Values that a forward refers to weakly live as long as its local variables, where it is not one graph, too."""

import weakref
from weakref import WeakValueDictionary, ref

import pytest
import torch
from torch import nn

import mfx

pytestmark = pytest.mark.filterwarnings("ignore:mfx. .* cannot be captured as one graph")
SEEN = WeakValueDictionary()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


class Model(nn.Module):
    """The local variable y is not read behind the value that is looked at; what refers to it is."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.cache = None

    def chain(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        x = self.chain(x)
        y = x * 2
        self.note(y)
        if float(x.detach().sum()) < -1e9:
            x = -x
        return x * self.found()


class InDictionary(Model):
    def __init__(self):
        super().__init__()
        self.cache = WeakValueDictionary()

    def note(self, y):
        self.cache["y"] = y

    def found(self):
        return self.cache["y"]


class InOwnObject(InDictionary):
    """One attribute deep."""

    def __init__(self):
        super().__init__()
        self.cache = Memory()


class Memory:
    def __init__(self):
        self.values = WeakValueDictionary()

    def __setitem__(self, name, value):
        self.values[name] = value

    def __getitem__(self, name):
        return self.values[name]


class InGlobal(Model):
    def note(self, y):
        SEEN["y"] = y

    def found(self):
        return SEEN["y"]


class ByReference(Model):
    def note(self, y):
        self.cache = weakref.ref(y)

    def found(self):
        return self.cache()


class SilentlyWithout(Model):
    """Computes something else where the value is gone."""

    def note(self, y):
        self.cache = ref(y)

    def found(self):
        return 3.0 if self.cache() is None else 2.0


KINDS = [InDictionary, InOwnObject, InGlobal, ByReference, SilentlyWithout]
X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.mark.parametrize("build", KINDS)
def test_at_gamma_zero_a_call_is_the_models(build):
    torch.manual_seed(0)
    model = build()
    net = mfx.momentumize(model, gamma=0.0)
    for training in (True, False):
        expected = model.train(training)(X)
        assert torch.equal(net.train(training)(X), expected)


class Held(InDictionary):
    """A module holds the chain."""

    def chain(self, x):
        return self.blocks(x)


def test_a_chain_that_a_module_holds_is_run_with_momentum():
    torch.manual_seed(0)
    net = mfx.momentumize(Held(), gamma=0.5)
    x, v = X.double(), torch.zeros_like(X).double()
    for block in net.blocks:
        v = 0.5 * v + 0.5 * torch.tanh(x @ block.f.weight.double().T + block.f.bias.double())
        x = x + v
    for _ in range(2):
        torch.testing.assert_close(net(X).double(), x * (x * 2), rtol=0, atol=1e-5)


class InEvaluation(InDictionary):
    def forward(self, x):
        return self.chain(x) if self.training else super().forward(x)


def test_a_chain_that_no_module_holds_is_an_error_where_another_call_has_it():
    net = mfx.momentumize(InEvaluation(), gamma=0.5)
    net(X)
    with pytest.raises(mfx.MfxError, match="holds but a piece of a chain"):
        net.eval()(X)
