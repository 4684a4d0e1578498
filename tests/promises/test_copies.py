"""deepcopy, pickle, torch.save: the copy is independent, and still reversible."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import Stack, assert_reversible, inputs
from tests.sampling import grid, sampled


def through_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net)), "save": through_torch_save}
copies = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


@grid(6, make_copy=COPIES, training={"train": True, "eval": False}, called={"called": True, "fresh": False})
def test_a_copy_computes_the_same_and_recomputes(make_copy, training, called):
    net = mfx.momentumize(Stack()).train(training)
    if called:
        net(inputs()).sum().backward()
    expected = net(inputs()).detach() if called else None
    copied = make_copy(net)
    expected = net(inputs()).detach() if expected is None else expected
    del net
    gc.collect()
    assert type(copied) is Stack
    assert copied.training is training
    assert torch.equal(copied(inputs()), expected)
    assert_reversible(copied, copied.blocks[0].mix, inputs())
    assert "momentum_blocks" in copied.code


@copies
def test_a_copy_is_independent(make_copy):
    net = mfx.momentumize(Stack())
    expected = net(inputs())
    copied = make_copy(net)
    assert not set(map(id, copied.parameters())) & set(map(id, net.parameters()))
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1.0)
    copied.blocks[0].mix = torch.nn.Identity()
    copied.eval()
    assert net.training
    assert torch.equal(net(inputs()), expected)
    mine = {id(module) for module in net.modules()}
    theirs = {id(module) for graph in mfx.graphs(copied).values() for module in graph.modules()}
    assert not mine & theirs


def test_a_copy_made_within_original_is_a_momentum_net():
    net = mfx.momentumize(Stack())
    expected = net(inputs())
    with mfx.original(net):
        copied = copy.deepcopy(net)
    assert torch.equal(copied(inputs()), expected)


class Line(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))

    def forward(self, x):
        for fc in self.fcs:
            x = x + 1e-3 * fc(x)
        return x


@pytest.fixture(scope="module")
def long_net():
    net = mfx.momentumize(Line(1000))
    net(torch.ones(1, 2))
    return net


@sampled("make_copy", COPIES, 1)
def test_a_thousand_blocks(make_copy, long_net):
    copied = make_copy(long_net)
    assert torch.equal(copied(torch.ones(1, 2)), long_net(torch.ones(1, 2)))
