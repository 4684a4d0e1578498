"""Functions of the user's that a forward may call, followed through what is wrapped around them."""

from functools import lru_cache, partial, wraps

import torch
from torch import nn

import mfx
from mfx.modules.references import References


def plain(x):
    return x


@wraps(plain)
def around(x):
    return plain(x)


@wraps(torch.Tensor.tanh)
def around_c(x):
    return torch.Tensor.tanh(x)


def found(value):
    references = References()
    references.add(value)
    return list(references.functions)


def test_a_function_is_found_in_its_wrapper():
    assert found(around) == found(partial(plain, 1)) == found(lru_cache(plain)) == [plain]


def test_a_wrapper_of_c_code_is_a_function_itself():
    assert found(around_c) == [around_c]


def asserting(x):
    assert x.sum() > 0
    return x


def test_what_pytest_makes_of_an_assertion_is_not_the_users():
    references = References()
    references.add(asserting)
    names = [name for name, _ in references.variables()]
    assert not any("pytest" in name or "py_" in name for name in names), names
    assert "@pytest_ar" in asserting.__globals__  # else nothing was rewritten


class Wrapping(nn.Module):
    bounded = around_c

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + around_c(layer(x))
        return x


def test_a_model_that_calls_one_is_captured():
    model, x = Wrapping(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0)
    assert torch.equal(net(x), model(x))
    assert [len(chain.steps) for chain in mfx.explain(net, x).chains] == [3]
