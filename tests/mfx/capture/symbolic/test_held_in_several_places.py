"""A tensor that a net holds in several places: a graph follows when one of them gets another."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import mfx
from mfx.capture.guards import TensorGuard, TieGuard
from mfx.net.forward import forward_of

DIM = 4


class Block(nn.Module):
    """A step that multiplies with a tensor that other blocks have, too."""

    def __init__(self, tensor, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(DIM, DIM), kind
        self.put(tensor)

    def put(self, tensor):
        if self.kind == "buffer":
            self.register_buffer("held", tensor)
        elif self.kind in ("list", "list of parameters"):
            self.held = [tensor]
        else:
            self.held = tensor

    def forward(self, x):
        return x + torch.tanh(self.fc(x)) * (self.held[0] if isinstance(self.held, list) else self.held)


class Blocks(nn.Module):
    def __init__(self, kind, count=3):
        super().__init__()
        torch.manual_seed(0)
        made = nn.Parameter(torch.ones(DIM)) if kind in PARAMETERS else torch.ones(DIM)
        self.blocks = nn.ModuleList(Block(made, kind) for _ in range(count))
        if kind == "list of parameters":
            self.own = made

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


PARAMETERS = ("parameter", "list of parameters")


class Whole(nn.Module):
    """A module that a trace calls as a whole, with an embedding in it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(20, DIM)

    def forward(self, ids):
        x = self.inner(ids)
        return x * 0 if x.isnan().any() else x


class Tied(nn.Module):
    """An embedding whose weight the head has, too, which the forward reads at the head."""

    def __init__(self, *, is_whole=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = Whole() if is_whole else nn.Embedding(20, DIM)
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.head = nn.Linear(DIM, 20, bias=False)
        self.tie_weights()

    @property
    def embedding(self):
        return self.embed.inner if isinstance(self.embed, Whole) else self.embed

    def tie_weights(self):
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return F.linear(x, self.head.weight)


IDS = torch.arange(10).reshape(2, 5)


def graphs_of(net):
    return forward_of(net).table.graphs


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("kind", ["attribute", "list", "buffer", *PARAMETERS])
def test_one_of_several_blocks_gets_another(kind, number, capture):
    model, x = Blocks(kind), torch.linspace(-1, 1, 2 * DIM).reshape(2, DIM)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture=capture)
    for value in (1.0, 2.0, 3.0):
        for each in (model, net):
            tensor = torch.full((DIM,), value)
            each.blocks[number].put(nn.Parameter(tensor) if kind == "parameter" else tensor)
        for _ in range(2):
            assert torch.equal(net(x), model(x))
    assert len(graphs_of(net)) <= 1 + 3  # of `momentumize`, and of every tensor once


def another_head(each):
    each.head.weight = nn.Parameter(torch.linspace(-1, 1, 20 * DIM).reshape(20, DIM))


def another_embedding(each):
    each.embedding.weight = nn.Parameter(torch.linspace(-1, 1, 20 * DIM).reshape(20, DIM))


def another_inner_module(each):
    torch.manual_seed(1)
    if isinstance(each.embed, Whole):
        each.embed.inner = nn.Embedding(20, DIM)
    else:
        each.embed = nn.Embedding(20, DIM)


def other_tensors(each):
    values = {name: torch.linspace(-1, 1, tensor.numel()).view_as(tensor) for name, tensor in each.state_dict().items()}
    each.load_state_dict(values, assign=True)


def parametrized(each):
    parametrize.register_parametrization(each.head, "weight", nn.Tanh())


def converted(each):
    each.double()


def tied_to_another(each):
    another_embedding(each)
    each.tie_weights()


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize(
    "change",
    [another_head, another_embedding, another_inner_module, other_tensors, parametrized, converted, tied_to_another],
)
def test_a_head_with_the_weight_of_an_embedding(change, is_whole):
    model = Tied(is_whole=is_whole)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    assert torch.equal(net(IDS), model(IDS))
    for each in (model, net):
        change(each)
    for _ in range(3):
        assert torch.equal(net(IDS), model(IDS))
    assert len(graphs_of(net)) <= 2
    for each in (model, net):
        if change is not parametrized:  # which has no weight to tie
            each.tie_weights()
    assert torch.equal(net(IDS), model(IDS))


@pytest.mark.parametrize("change", [Tied.tie_weights, tied_to_another, converted])
def test_what_stays_tied_needs_no_other_graph(change):
    net = mfx.momentumize(Tied(), gamma=0.0)
    net(IDS)
    change(net)
    net(IDS)
    assert len(graphs_of(net)) == 1


def test_weights_of_one_call_need_no_other_graph():
    model = Tied()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for factor in (1.0, 2.0, 3.0):
        weights = {name: factor * tensor.detach() for name, tensor in model.named_parameters()}
        expected = torch.func.functional_call(model, weights, (IDS,))
        assert torch.equal(torch.func.functional_call(net, weights, (IDS,)), expected)
    assert len(graphs_of(net)) == 1


def test_copies_have_guards_of_their_own():
    net = mfx.momentumize(Tied(), gamma=0.0)
    net(IDS)
    other = copy.deepcopy(net)
    another_head(other)
    with mfx.original(other):
        expected = other(IDS)
    assert torch.equal(other(IDS), expected)
    assert torch.equal(net(IDS), Tied()(IDS))
    assert len(graphs_of(net)) == 1


class Called(Tied):
    """The same, by a call of the head, which reads its own weight."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x)) * self.scale
        return self.head(x)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))


def test_only_what_a_graph_reads_in_one_of_several_places_is_guarded():
    found = {}
    for net in (mfx.momentumize(model, gamma=0.0) for model in (Tied(), Called())):
        net(IDS)
        (graph,) = graphs_of(net)
        found[type(net).__name__] = [guard for guard in graph.guards if isinstance(guard, TensorGuard | TieGuard)]
    assert len(found["Tied"]) == 1
    assert found["Called"] == []
