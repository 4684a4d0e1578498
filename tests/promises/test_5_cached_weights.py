"""Weights that ``parametrize.cached()`` holds in the forward pass are those of the recomputation, and no others."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mfx


class Tied(nn.Module):
    """Steps with a parametrized weight, the last two with the same."""

    def __init__(self) -> None:
        super().__init__()
        mixes = [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(3)]
        self.mixes = nn.ModuleList([*mixes, mixes[-1]])

    def forward(self, x):
        for mix in self.mixes:
            x = x + torch.tanh(mix(x))
        return x


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("closed_before", ["the second call", "backward", "nothing"])
def test_weights_are_cached_in_a_recomputation_as_they_were(gamma, closed_before):
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(3, 8)
    reference = mfx.momentumize(copy.deepcopy(model), gamma=gamma, memory_budget=1.0)
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma)
    found = []
    for each in (net, reference):
        with nn.utils.parametrize.cached():
            y = each(x)
            if closed_before != "the second call":
                y = each(y)
            if closed_before == "nothing":
                y.sum().backward()
        if closed_before == "the second call":
            y = each(y)
        if closed_before != "nothing":
            y.sum().backward()
        found.append([y, *(p.grad for p in each.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Twice(nn.Module):
    """Blocks that are used for two inputs, with statistics that each computation of a weight changes."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.mixes = nn.ModuleList(norm(nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x, y):
        return self.states(x), self.states(y)

    def states(self, x):
        for mix in self.mixes:
            x = x + torch.tanh(mix(x))
        return x


@pytest.mark.filterwarnings("ignore:mfx. Twice is called inside of torch.nn.utils.parametrize.cached")
@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_a_cached_weight_is_computed_once(capture):
    torch.manual_seed(0)
    model = Twice()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture=capture)
    for is_cached in (False, True, False):
        given = torch.randn(3, 8), torch.randn(3, 8)
        found = []
        for each in (net, model):
            each.zero_grad()
            with nn.utils.parametrize.cached() if is_cached else nullcontext():
                outputs = each(*given)
            sum(output.sum() for output in outputs).backward()
            found.append([*outputs, *each.buffers(), *(p.grad for p in each.parameters())])
        assert all(map(torch.equal, *found)), is_cached
    assert {len(chain.steps) for chain in mfx.explain(net, *given).chains} == {3}
