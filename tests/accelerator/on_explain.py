"""Predictions for a net whose tensors are on an accelerator, and its calls before and after them."""

import copy

import pytest
import torch

import mfx
from tests.accelerator import device as fake
from tests.accelerator.nets import Block, batch, momentumized, stack, trained

SETTINGS = [{}, {"gamma": 0.0, "recompute": "all"}, {"arithmetic": "float", "memory_budget": 0.5}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_prediction_is_that_for_a_cpu(options):
    model = stack(lambda: Block(0.1))
    here = mfx.explain(mfx.momentumize(copy.deepcopy(model), **options), batch())
    there = mfx.explain(momentumized(model, **options), fake.to_device(batch()))
    assert str(there) == str(here)
    assert not there.unpredicted


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_prediction_changes_no_step(options):
    """Neither what is computed nor what is drawn; nor does it when it is made between two calls."""
    model = stack(lambda: Block(0.1))
    net, other = (momentumized(model, **options) for _ in range(2))
    for _ in range(2):
        mfx.explain(net, fake.to_device(batch()))
        assert all(map(torch.equal, trained(net, batch()), trained(other, batch())))
