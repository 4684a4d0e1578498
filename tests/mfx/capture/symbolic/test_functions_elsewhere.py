"""Functions in other files than the modules that call them get the answers in a trace that they get in a call."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.mfx.capture.symbolic import functions_elsewhere


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Model(nn.Module):
    def __init__(self, prepare):
        super().__init__()
        torch.manual_seed(0)
        self.prepare = prepare
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.prepare(x))


def _results(model):
    """Return the outputs and gradients of calls with gradients, without, under autocast and with other sizes."""
    first, second = (torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in (2, 3))
    outputs = [model(first)]
    with torch.no_grad():
        outputs.append(model(first))
    with torch.autocast("cpu"):
        outputs.append(model(first))
    outputs.append(model(second))
    outputs[0].sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [*outputs, *gradients]


def _check(prepare, capture):
    model = Model(prepare)
    expected = _results(model)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    assert all(map(torch.equal, _results(net), expected))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


@pytest.mark.parametrize("capture", ["auto", pytest.param("dynamo", marks=pytest.mark.zoo)])
@pytest.mark.parametrize("function", functions_elsewhere.FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_elsewhere_gets_the_answers_of_a_call(function, capture):
    _check(function, capture)


def test_a_function_whose_name_is_computed_gets_the_answers_of_a_call(monkeypatch):
    """Nothing mentions it, so its file is found as it runs."""
    module = ModuleType("made_for_this_test")
    vars(module)["Tensor"] = Tensor
    exec("def ask(x):\n    y = x + 0\n    return y * (2 if type(y) is Tensor else 3)", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    _check(lambda x: vars(module)["".join("ask")](x), "auto")


def _made_in_a_call(x):
    namespace: dict[str, Any] = {}
    exec("def double(x):\n    y = x + 0\n    return (y * 2).relu()", namespace)
    return namespace["double"](x)


def _asks_in_code_made_in_a_call(x):
    namespace = {"Tensor": Tensor}
    exec("def ask(x):\n    y = x + 0\n    return y * (2 if type(y) is Tensor else 3)", namespace)
    return namespace["ask"](x)


@pytest.mark.filterwarnings("ignore:mfx. Model cannot be captured as one graph")
@pytest.mark.parametrize("prepare", [_made_in_a_call, _asks_in_code_made_in_a_call])
def test_code_that_a_call_makes_gets_the_answers_of_a_call(prepare):
    _check(prepare, "auto")
