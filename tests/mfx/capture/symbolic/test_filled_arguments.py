"""Containers of the caller's that a forward fills: each call fills the one that it is given, and once."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import mfx

WIDTH = 4


def count_in_a_list(y, held):
    held.append(len(held))
    return y * len(held)


def count_in_a_dictionary(y, held):
    held["n"] = held.get("n", 0) + 1
    return y * held["n"]


def keep_in_a_list(y, held):
    held.append(y.detach())
    held.append(len(held))
    return y * len(held)


def keep_in_a_dictionary(y, held):
    held["y"] = y.detach()
    held["n"] = len(held)
    return y * held["n"]


def keep_inside(y, held):
    held["inner"]["y"] = y.detach()
    held["inner"]["n"] = len(held["inner"])
    return y * held["inner"]["n"]


CASES = {
    "list": (count_in_a_list, list),
    "dictionary": (count_in_a_dictionary, dict),
    "list of tensors": (keep_in_a_list, list),
    "dictionary of tensors": (keep_in_a_dictionary, dict),
    "ordered": (keep_in_a_dictionary, OrderedDict),
    "inside": (keep_inside, lambda: {"inner": {}}),
}


class Model(nn.Module):
    def __init__(self, fill):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fill = fill

    def forward(self, x, held):
        for fc in self.fc:
            x = x + fc(x).tanh()
        return self.fill(x, held)


def plain(value):
    """Return the same without tensors, which are compared as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.filterwarnings("ignore:mfx:UserWarning")
@pytest.mark.parametrize("capture", ["auto", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_fills_what_it_is_given(name, capture):
    fill, make = CASES[name]
    model = Model(fill)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture=capture)
    for seed in range(3):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
        mine, theirs = make(), make()
        assert torch.equal(net(x, mine), model(x, theirs))
        assert plain(mine) == plain(theirs)
