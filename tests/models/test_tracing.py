"""Spellings in models that a tracer has to be told about.

PYTEST_DONT_REWRITE: pytest replaces the assert statements of a test module by code of its own, those of models too.
"""

import pytest
import timm.layers
import torch
from torch import nn

import mfx


class Residual(nn.Module):
    """x + f(x), x + g(x), and in between whatever ``forward`` does with sizes."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def steps(self, x):
        x = x + self.f(x)
        return x + self.g(x)


class StarredSizes(Residual):
    def forward(self, x):
        *_, h, w, dtype = *x.shape, x.dtype
        b, *_ = x.shape
        n, m = x.shape[-2:]
        return self.steps(x).reshape(b, h, w).to(dtype) * (n * m)


class StarredRest(Residual):
    def forward(self, x):
        b, *rest = x.shape
        return self.steps(x).reshape(b, *rest)


class Asserting(Residual):
    def forward(self, x):
        assert x.shape[1] % 2 == 0 and x.shape[2] == 4, "an even number of tokens"  # noqa: PT018
        assert not x.shape[0] == 3  # noqa: SIM201
        return self.steps(x)


class Masking(Residual):
    def forward(self, x):
        return self.steps(x.masked_fill(x > 1, -torch.finfo(x.dtype).max).clamp(min=-1))


@pytest.mark.parametrize("kind", [StarredSizes, Asserting, Masking])
def test_traced(kind):
    model = kind()
    net = mfx.momentumize(model, gamma=0.0)
    for shape in [(2, 6, 4), (5, 2, 4)]:
        x = torch.randn(shape)
        assert torch.equal(net(x), model(x))


def test_names_that_are_read_need_the_number_of_parts():
    with pytest.raises(mfx.MfxError, match="rest"):
        mfx.momentumize(StarredRest(), capture="symbolic")


@pytest.mark.parametrize("shape", [(2, 5, 4), (3, 2, 4)])
def test_assertions_still_hold(shape):
    net = mfx.momentumize(Asserting())
    with pytest.raises(AssertionError):
        net(torch.randn(shape))


class LooksAtSizes(Residual):
    def forward(self, x):
        self.seen = x.shape[1]
        self.f(x)
        if x.shape[1] > 3:
            x = -x
        return self.f(x) + self.g(x)


class Blocks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList([kind(), kind(), kind()])
        self.blocks[2].f = self.blocks[0].f

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.blocks[0].f(x)


def test_modules_that_timm_registers_are_called_as_they_are():
    with pytest.raises(mfx.MfxError, match="control flow"):
        mfx.momentumize(Blocks(LooksAtSizes), capture="symbolic")
    timm.layers.register_notrace_module(LooksAtSizes)
    try:
        model = Blocks(LooksAtSizes)
        net = mfx.momentumize(model, gamma=0.0)
        assert "seen" not in net.blocks[0].__dict__
        for tokens in (2, 6):
            x = torch.randn(2, tokens, 4)
            assert torch.equal(net(x), model(x))
        assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]
    finally:
        timm.layers._fx._leaf_modules.remove(LooksAtSizes)


def test_modules_that_timm_registers_are_looked_into_where_that_works():
    timm.layers.register_notrace_module(Residual)
    try:
        Residual.forward = Residual.steps
        found = mfx.explain(nn.Sequential(Residual(), Residual()))
        assert [len(chain.steps) for chain in found.chains] == [4]
    finally:
        del Residual.forward
        timm.layers._fx._leaf_modules.remove(Residual)


@timm.layers.register_notrace_function
def halved_if_long(x):
    return x / 2 if x.shape[1] > 3 else x


class CallsFunction(Residual):
    def forward(self, x):
        return self.steps(halved_if_long(x))


def test_functions_that_timm_registers_are_called_as_they_are():
    model = CallsFunction()
    net = mfx.momentumize(model, gamma=0.0)
    for tokens in (2, 6):
        x = torch.randn(2, tokens, 4)
        assert torch.equal(net(x), model(x))
