"""Blocks in no chain are tagged, each apart; a module around several of them is left open where it may be."""

import pytest
import torch
from torch import nn

from mfx_passes import Selection, rewrite_graph
from mfx_passes.ir import block_of
from tests.passes.harness import traced


class Block(nn.Module):
    def __init__(self, skips=True):
        super().__init__()
        self.skips, self.f = skips, nn.Linear(4, 4)

    def forward(self, x):
        return x + self.f(x) if self.skips else self.f(x).tanh()


class Merging(nn.Module):
    """Adds up two branches, of one input or of two."""

    def __init__(self, inputs=1):
        super().__init__()
        self.inputs, self.f, self.g = inputs, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y=None):
        return self.f(x) + self.g(x if y is None else x * y)


class Net(nn.Module):
    def __init__(self, inputs=1):
        super().__init__()
        self.stem, self.head, self.inputs = nn.Linear(4, 4), nn.Linear(4, 4), inputs
        self.chain = nn.Sequential(Block(), Block(), Block())
        self.stage = nn.Sequential(Block(skips=False), nn.Tanh(), Block())
        self.merging = Merging(inputs)

    def forward(self, x):
        y = self.stage(self.chain(self.stem(x)))
        z = self.merging(y, y.tanh()) if self.inputs == 2 else self.merging(y)
        return self.head(z)


def tags(model, *, may_open=lambda path: True, **selection):
    case = traced(model, (torch.randn(2, 4),))
    done = rewrite_graph(
        case.graph, case.modules, lambda graphs: ("run", None), Selection(**selection), case.calls, may_open
    )
    found = {str(node.target): block_of(node) for node in case.graph.find_nodes(op="call_module")}
    return found, done.opened


def test_blocks_of_the_classes_in_chains_and_merging_branches():
    found, opened = tags(Net())
    blocks = {path: path for path in ("stage.0", "stage.2", "merging")}
    assert found == {"stem": None, "run": None, "stage.1": None, "head": None, **blocks}
    assert opened == ["stage"]


@pytest.mark.parametrize("may_open", [None, lambda path: False])
def test_what_may_not_be_opened_is_called_as_a_whole(may_open):
    found, opened = tags(Net(), may_open=may_open)
    assert found == {"stem": None, "run": None, "stage": None, "head": None, "merging": may_open and "merging"}
    assert not opened


def test_what_reads_two_values_is_no_block():
    assert tags(Net(inputs=2))[0]["merging"] is None


def test_selections():
    assert tags(Net(), skip=("stage", "merging"))[0]["stage"] is None
    assert not any(tags(Net(), only=("chain",))[0].values())
    assert not any(tags(Net(), forward_only=True)[0].values())
