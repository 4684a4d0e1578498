"""Branches that write into a cache they are given: where no gradients are recorded, none of them runs again."""

import copy

import pytest
import torch
from torch import nn

import mfx


class Model(nn.Module):
    """Each block keeps a running mean of what it saw in a tensor of the caller's, its own one or one for all."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.shared = shared

    def forward(self, x, caches):
        for i, layer in enumerate(self.layers):
            cache = caches[0 if self.shared else i]
            cache.copy_(0.9 * cache + 0.1 * x)
            x = x + torch.tanh(layer(x + cache))
        return x


def call(net):
    torch.manual_seed(1)
    x, caches = torch.randn(2, 4), [torch.randn(2, 4) for _ in range(3)]
    return [net(x, caches), *caches]


def recurrence(model, gamma):
    """The momentum network, written out."""
    torch.manual_seed(1)
    x, caches = torch.randn(2, 4), [torch.randn(2, 4) for _ in range(3)]
    v = torch.zeros_like(x)
    for cache, layer in zip(caches, model.layers, strict=True):
        cache.copy_(0.9 * cache + 0.1 * x)
        v = gamma * v + (1 - gamma) * torch.tanh(layer(x + cache))
        x = x + v
    return [x, *caches]


def lengths(net):
    return [len(chain.steps) for chain in mfx.explain(net).chains]


@pytest.mark.parametrize("shared", [False, True])
def test_without_gradients_a_step_may_write_into_what_it_alone_reads(shared):
    model = Model(shared=shared)
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")
    with torch.no_grad():
        if shared:
            with pytest.warns(UserWarning, match="no chain"):
                found = call(net)
        else:
            found = call(net)
        for _ in range(2):
            assert all(map(torch.equal, found, call(model)))
            found = call(copy.deepcopy(net))
    assert lengths(net) == ([] if shared else [3])


def test_with_momentum():
    model = Model()
    with torch.no_grad():
        found, expected = call(mfx.momentumize(model, gamma=0.5, capture="dynamo")), recurrence(model, 0.5)
    for a, b in zip(found, expected, strict=True):  # states of 40 fraction bits or float32, three steps
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_with_gradients_it_would_write_twice():
    net = mfx.momentumize(Model(), gamma=0.0, capture="dynamo")
    with pytest.warns(UserWarning, match="no chain"):
        call(net)
    assert {r.reason.split(" ", 1)[1] for r in mfx.explain(net).rejections} == {
        "changes in place a value that the branch is given from outside"
    }


def test_the_networks_with_and_without_gradients_must_be_one():
    net = mfx.momentumize(Model(), gamma=0.5, capture="dynamo")
    with torch.no_grad():
        call(net)
    with pytest.raises(mfx.MfxError, match="other chains in one call than in another"):
        call(net)
