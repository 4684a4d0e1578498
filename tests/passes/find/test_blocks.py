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


class Sized(Merging):
    """Reads the size of its input."""

    def forward(self, x):
        return super().forward(x).view(x.shape[0], -1, x.size(-1))


def test_sizes_of_the_input_are_no_second_value():
    net = Net()
    net.merging = Sized()
    assert tags(net)[0]["merging"] == "merging"


class Tower(nn.Module):
    """Adds up its layers in one forward, or runs some of them without a skip."""

    def __init__(self, layers, skips):
        super().__init__()
        self.layers, self.skips = nn.ModuleList(layers), skips

    def forward(self, x):
        for layer, skips in zip(self.layers, self.skips, strict=True):
            x = x + layer(x) if skips else layer(x)
        return x


def branch(norm=False):
    return nn.Sequential(nn.Tanh() if norm else nn.Linear(4, 4), nn.Linear(4, 4))


def in_stages(first, second):
    return nn.Sequential(first, nn.Linear(4, 4), second)


def block_paths(net):
    return {path for path in tags(net)[0].values() if path is not None}


def test_in_a_tower_the_layers_are_the_blocks():
    def tower(*skips):
        return Tower([branch() for _ in skips], skips)

    skips = (True, False) * 2
    layers = {f"2.layers.{number}" for number in range(4)}
    assert block_paths(in_stages(tower(True, True), tower(*skips))) == layers
    assert block_paths(in_stages(tower(True, True), tower(True))) == {"2.layers.0"}
    assert block_paths(in_stages(nn.Sequential(tower(True), tower(True), tower(True, True)), tower(*skips))) == layers


def test_a_linear_layer_of_a_tower_keeps_nothing_but_its_input():
    def tower(*skips):
        return Tower([nn.Linear(4, 4) for _ in skips], skips)

    assert not block_paths(in_stages(tower(True, True), tower(True, False)))


def test_a_block_of_two_kinds_of_steps_is_a_whole():
    def pair(*skips):
        return Tower([branch(), branch(norm=True)], skips)

    pairs = nn.Sequential(pair(True, True), pair(True, True))
    assert block_paths(in_stages(pairs, pair(True, False))) == {"2"}
    several = Tower([branch(number % 2 == 1) for number in range(6)], (True, False) * 3)
    assert not block_paths(in_stages(pairs, several))


class Half(nn.Module):
    """Its first sum may have a projection; its second one is a step of a chain."""

    def __init__(self, projects):
        super().__init__()
        self.skip, self.f, self.g = nn.Linear(4, 4) if projects else nn.Identity(), branch(), branch(norm=True)

    def forward(self, x):
        x = self.skip(x) + self.f(x)
        return x + self.g(x)


def test_the_part_of_a_block_before_a_chain():
    found, _ = tags(nn.Sequential(Half(False), Half(False), Half(True), Half(False)))
    assert {path: tag for path, tag in found.items() if tag is not None} == {"2.skip": "2", "2.f": "2"}


def test_selections():
    assert tags(Net(), skip=("stage", "merging"))[0]["stage"] is None
    assert not any(tags(Net(), only=("chain",))[0].values())
    assert not any(tags(Net(), forward_only=True)[0].values())
