"""Arguments and results of a call are let go when the caller lets them go, after a first call, too."""

import gc
import weakref

import pytest
import torch
from torch import nn

import mfx
from mfx.net.forward import forward_of
from tests.mfx.net.test_captures_for_lengths import Classifier


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.kind = None

    def forward(self, x, labels=None, extra=None):
        for fc in self.fcs:
            x = x + torch.tanh(fc(x))
        x = self.behind(x)
        x = x if extra is None else x * extra
        return x if labels is None else (x, (x - labels).square().mean())

    def behind(self, x):
        return x


class Noting(Model):
    """Sets an attribute at its first call."""

    def behind(self, x):
        if self.kind is None:
            self.kind = str(x.dtype)
        return x


class NotTraced(Model):
    """Symbolic tracing does not follow, and TorchDynamo makes one graph."""

    def behind(self, x):
        return x * float(len(list(x)))


class Decided(Model):
    def behind(self, x):
        return x * 2 if (x.detach().sum() > -1e9).item() else x


class Broken(Model):
    """Two graphs and a value that is looked at in between."""

    def behind(self, x):
        number = float(x.detach().sum())
        return x * 2 if f"{number:.2f}" != "nan" else x


def given():
    return {"x": torch.ones(2, 8), "labels": torch.zeros(2, 8), "extra": torch.ones(8)}


def left_alive(net, make, calls=2):
    """Return how many tensors that calls took, computed and returned are alive after them, of how many."""
    references = []
    for number in range(calls):
        values = make()
        result = net(**values)
        loss = result[1]
        loss.backward()
        tensors = [value for value in torch.utils._pytree.tree_leaves((values, result)) if torch.is_tensor(value)]
        references += map(weakref.ref, tensors)
        del values, result, loss, tensors
        gc.collect()
        net.train(number % 2 == 1)
    return sum(reference() is not None for reference in references), len(references)


ROUTES = {
    "symbolic": (Model, "symbolic", "ByName"),
    "dynamo": (Model, "dynamo", "GuardedCall"),
    "dynamo, with a note": (Noting, "dynamo", "GuardedCall"),
    "auto that falls to dynamo": (NotTraced, "auto", "GuardedCall"),
    "decided": (Decided, "auto", None),
    "pieces": (Broken, "auto", "StretchBinding"),
}


@pytest.mark.filterwarnings("ignore:mfx. .* cannot be captured as one graph")
@pytest.mark.parametrize("build, capture, binding", ROUTES.values(), ids=ROUTES)
def test_nothing_of_a_call_stays_alive(build, capture, binding):
    net = mfx.momentumize(build(), gamma=0.5, capture=capture)
    assert left_alive(net, given) == (0, 10)
    bindings = {type(graph.captured.binding).__name__ for graph in forward_of(net).table.graphs}
    assert binding is None or binding in bindings


@pytest.mark.parametrize("capture", ["auto", "symbolic", "dynamo"])
def test_nothing_of_token_ids_of_several_lengths(capture):
    lengths = iter((5, 9, 7))

    def make():
        ids = torch.randint(0, 50, (2, length := next(lengths)))
        return {"ids": ids, "mask": torch.ones(2, length), "labels": torch.tensor([0, 2])}

    assert left_alive(mfx.momentumize(Classifier(), capture=capture), make, 3) == (0, 15)


SCRIPT = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        for fc in self.fcs:
            x = x + torch.tanh(fc(x)) * scale
        return x
scale = 2.0
x = torch.ones(2, 8)
"""


def test_variables_of_the_script_that_has_the_class():
    script = {"__name__": "a_script"}
    exec(SCRIPT, script)
    net = mfx.momentumize(script["Net"](), capture="dynamo")
    script["y"] = net(script["x"])
    net(script["x"])
    references = [weakref.ref(script.pop(name)) for name in "xy"]
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert net(torch.ones(2, 8)).shape == (2, 8)


def test_the_count_sees_what_is_kept():
    net = mfx.momentumize(Model(), capture="dynamo")
    kept = []
    net.register_forward_hook(lambda module, args, kwargs, output: kept.append((kwargs, output)), with_kwargs=True)
    assert left_alive(net, given) == (10, 10)
