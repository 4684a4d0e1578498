"""Tensors that a forward makes of numbers, and writes into or returns, are made anew by each call."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import mfx
from tests.sampling import grid

WIDTH = 4


def added(x):
    total = torch.zeros(WIDTH)
    total += x.mean(0)
    return x, total


def added_by_name(x):
    total = torch.zeros(WIDTH)
    total.add_(x.mean(0))
    return x, total


def filled(x):
    total = torch.zeros(WIDTH)
    total[0] = x.sum()
    return x, total + 1


def computed_from_later(x):
    total = torch.zeros(WIDTH)
    total.add_(x.mean(0))
    return x, total * 2


def viewed_before(x):
    total = torch.zeros(WIDTH)
    part = total[:2]
    total.add_(x.mean(0))
    return x, part * 1


def written_by_a_view(x):
    total = torch.zeros(WIDTH)
    total[:2].add_(x.mean(0)[:2])
    return x, total * 2


def written_by_out(x):
    total = torch.zeros(WIDTH)
    torch.add(x.mean(0), 1, out=total)
    return x, total * 2


def written_by_data(x):
    total = torch.zeros(WIDTH)
    total.data.add_(x.mean(0))
    return x, total + 0


def written_in_a_list(x):
    total = torch.zeros(WIDTH)
    torch._foreach_add_([total], [x.mean(0)])
    return x, total + 0


def copied(x):
    one, other = torch.zeros(WIDTH), torch.zeros(WIDTH)
    one.copy_(x.mean(0))
    other.copy_(one)
    return x, other + 1


def masked(x):
    mask = torch.ones(WIDTH, WIDTH).tril()
    mask.masked_fill_(x[:1] > 0, 0.0)
    return x @ mask, mask + 0


def scattered(x):
    total = torch.zeros(WIDTH)
    total.index_add_(0, torch.tensor([0, 1]), x.mean(0)[:2])
    return x, total + 0


def decided_by(x):
    total = torch.zeros(())
    total.add_(x.sum())
    return x, total + 1 if total > 0 else total - 1


def read(x):
    total = torch.zeros(())
    total.add_(x.sum())
    return x, torch.tensor(total.item())


def returned(x):
    return {"x": x, "rest": [torch.zeros(2), (torch.ones(()), torch.arange(3))]}


def returned_twice(x):
    total = torch.zeros(WIDTH)
    return x, total, total


def a_view_returned(x):
    return x, torch.zeros(WIDTH)[:2]


def of_an_old_class(x):
    total = torch.FloatTensor([0.0] * WIDTH)
    total.add_(x.mean(0))
    return x, total


FORWARDS = (
    added,
    added_by_name,
    filled,
    computed_from_later,
    viewed_before,
    written_by_a_view,
    written_by_out,
    written_by_data,
    written_in_a_list,
    copied,
    masked,
    scattered,
    decided_by,
    read,
    returned,
    returned_twice,
    a_view_returned,
    of_an_old_class,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.fc(x).tanh()


class Model(nn.Module):
    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.end = end

    def forward(self, x):
        return self.end(self.blocks(x).detach() if self.end in DETACHED else self.blocks(x))


DETACHED = {written_by_out, written_by_data, decided_by, read}


def compare(model, net, calls=3):
    """Call both, with a caller that writes into what is returned."""
    for seed in range(calls):
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
        found, expected = (pytree.tree_leaves(each(x)) for each in (net, model))
        assert all(map(torch.equal, found, expected)), seed
        assert [a is b for a in found for b in found] == [a is b for a in expected for b in expected]
        with torch.no_grad():
            for tensor in (*found[1:], *expected[1:]):
                tensor.add_(1)


@pytest.mark.filterwarnings("ignore:mfx:UserWarning")
@grid(len(FORWARDS), end=FORWARDS, capture=("auto", "symbolic"))
def test_each_call_has_its_own(end, capture):
    model = Model(end)
    compare(model, mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture=capture))


@pytest.mark.parametrize("end", [added, returned])
def test_what_a_call_makes_ends_no_symbolic_trace(end):
    net = mfx.momentumize(Model(end), gamma=0.0, capture="symbolic")
    net(torch.randn(2, WIDTH))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


class Adds(nn.Module):
    """A block that adds to what the model has made, by one way to hand it on."""

    def __init__(self, way):
        super().__init__()
        self.fc, self.way = nn.Linear(WIDTH, WIDTH), way

    def forward(self, x, held):
        if self.way == "inside":
            total = torch.zeros(WIDTH)
            total += x.detach().mean(0)
            return x + self.fc(x * total)
        if self.way == "argument":
            held += x.detach().mean(0)
        elif self.way == "list":
            held[0] += x.detach().mean(0)
        else:
            held.total.add_(x.detach().mean(0))
        return x + self.fc(x)


class Losses(nn.Module):
    """Blocks that add up a loss beside the stream, as mixtures of experts do."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.way = nn.ModuleList(Adds(way) for _ in range(4)), way

    def forward(self, x):
        total = torch.zeros(WIDTH)
        held = {"list": [total], "object": SimpleNamespace(total=total)}.get(self.way, total)
        for block in self.blocks:
            x = block(x, held)
        return x, (held[0] if self.way == "list" else total)


@pytest.mark.parametrize("way", ["inside", "argument", "list", "object"])
def test_a_sum_over_blocks_begins_anew(way):
    model = Losses(way)
    compare(model, mfx.momentumize(copy.deepcopy(model), gamma=0.0))
    nets = [mfx.momentumize(copy.deepcopy(model), gamma=0.9, memory_budget=budget) for budget in (0.0, 1.0)]
    compare(*nets)


@pytest.mark.filterwarnings("ignore:mfx:UserWarning")
def test_a_tensor_of_the_models_own_keeps_what_is_written():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.total = Model(None).blocks, torch.zeros(WIDTH)

        def forward(self, x):
            x = self.blocks(x)
            self.total.add_(x.detach().mean(0))
            return x, self.total * 2

    model = Counts()
    compare(model, mfx.momentumize(copy.deepcopy(model), gamma=0.0))
