"""Blocks in no chain that run again in the backward pass are named."""

import pytest
import torch
from torch import nn

import mfx
from mfx.reports.page import sections


class Projected(nn.Module):
    """Adds up two branches, as a block that changes the shape."""

    def __init__(self):
        super().__init__()
        self.f, self.skip = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.skip(x) + self.f(x))


class Step(nn.Module):
    """x + f(x)."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


@pytest.mark.parametrize(
    ("options", "blocks"), [({}, ("2",)), ({"memory_budget": 1.0}, ()), ({"recompute": "all"}, ())], ids=str
)
def test_blocks_that_run_again_are_named(options, blocks):
    net = mfx.momentumize(nn.Sequential(Step(), Step(), Projected(), Step(), Step()), **options)
    explanation = mfx.explain(net)
    assert [rejection.path for rejection in explanation.rejections] == ["2"]
    assert explanation.blocks == blocks
    assert explanation.to_dict()["blocks"] == list(blocks)
    words = "recomputed in the backward pass, unless a budget keeps their activations: 2"
    shown = (" ".join(str(explanation).split()), explanation._repr_html_(), str(sections.rejections(explanation)))
    assert [words in text for text in shown] == [bool(blocks)] * 3
