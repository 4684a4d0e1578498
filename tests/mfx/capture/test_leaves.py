"""A module that a symbolic trace cannot walk through is called as a whole; the chain around it stays."""

import copy
import pickle
import random
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mfx
from mfx.capture.binding import ByName
from mfx.net.forward import forward_of
from tests.models.step import assert_bit_equal, train_step
from tests.sampling import grid


class Branch(nn.Module):
    """A branch with one line that a trace cannot follow."""

    def __init__(self, look, dim=8) -> None:
        super().__init__()
        self.look = look
        self.norm, self.fc = nn.BatchNorm1d(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.look(F.dropout(self.fc(self.norm(x)), 0.2, self.training))


class Net(nn.Module):
    def __init__(self, look) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branch(look) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def decision(y):
    return y / 2 if y.abs().max() > 1 else y


def item(y):
    return y * min(float(y.detach().abs().max()), 2.0)


def through_numpy(y):
    return y * torch.from_numpy(numpy.tanh(y.detach().numpy()))


def tried(y):
    try:
        if y.isnan().any():
            raise ValueError("not a number")
    except ValueError:
        y = torch.zeros_like(y)
    return y


def rows(y):
    return torch.stack([row.tanh() for row in (part for part in y)])


def drawn(y):
    return y * random.choice((0.5, 1.0))


def listed(y):
    return y * torch.tensor(y.detach().mean(0).tolist())


LOOKS = (decision, item, tried, rows, listed)


@grid(len(LOOKS), look={look.__name__: look for look in LOOKS}, arithmetic=["exact", "float"])
def test_a_leaf_keeps_the_chain_around_it(look, arithmetic):
    torch.manual_seed(0)
    model, inputs = Net(look), (torch.randn(4, 8),)
    net = mfx.momentumize(model, gamma=0.0, arithmetic=arithmetic)
    for training in (True, False):
        model.train(training), net.train(training)
        assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
        assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]


class AnyName(Branch):
    """A leaf that has an attribute of any name."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return 2


class OwnNames(Branch):
    """A leaf with attributes whose names mean something to mfx elsewhere."""

    def __init__(self, look):
        super().__init__(look)
        self.writes, self.reads, self.steps = 2, 3, 4


@pytest.mark.parametrize("leaf", [OwnNames, AnyName])
def test_a_leaf_may_have_attributes_of_any_name(leaf):
    torch.manual_seed(0)
    model, x = Net(decision), torch.randn(5, 8)
    model.blocks = nn.ModuleList(leaf(decision) for _ in range(4))
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0).eval()
    assert torch.equal(net(x), model.eval()(x))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]


def test_what_numpy_computes_is_left_to_numpy():
    torch.manual_seed(0)
    model, inputs = Net(through_numpy), (torch.randn(4, 8),)
    net = mfx.momentumize(model, gamma=0.0)
    assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
    with pytest.raises(mfx.MfxError, match=r"numpy computes \w+ of the values of tensors"):
        mfx.momentumize(model, capture="dynamo")(*inputs)


class Returns(nn.Module):
    """A leaf whose output is made into something by ``give``."""

    def __init__(self, give, dim=8) -> None:
        super().__init__()
        self.fc, self.give = nn.Linear(dim, dim), give

    def forward(self, x):
        return self.give(decision(self.fc(x)))


class ReadsStructure(nn.Module):
    def __init__(self, give) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Returns(give) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            if isinstance(y, dict):
                y = y["y"], y["more"]
            y, more = y
            x = x + (y if more is None else y * more)
        return x


@pytest.mark.parametrize(
    "give",
    [lambda y: (y, None), lambda y: (y, float(y.detach().mean())), lambda y: {"y": y, "more": None}],
    ids=["nothing", "a number", "a dictionary"],
)
def test_the_structure_of_what_a_leaf_returns_is_known(give):
    torch.manual_seed(0)
    model, inputs = ReadsStructure(give), (torch.randn(4, 8),)
    net = mfx.momentumize(model, gamma=0.0)
    assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class HoldsChain(Branch):
    def __init__(self, look) -> None:
        super().__init__(look)
        self.body = nn.Sequential(*(Residual() for _ in range(3)))

    def forward(self, x):
        return super().forward(self.body(x))


def test_chains_inside_of_leaves_and_what_explain_says():
    torch.manual_seed(0)
    model, inputs = Net(decision), (torch.randn(4, 8),)
    model.blocks = nn.ModuleList(HoldsChain(decision) for _ in range(2))
    net = mfx.momentumize(model, gamma=0.0)
    assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
    found = mfx.explain(net)
    lengths = {chain.name: len(chain.steps) for chain in found.chains}
    assert lengths == {"blocks": 2, "blocks.0.body": 3, "blocks.1.body": 3}
    assert list(found.leaves) == ["blocks.0", "blocks.1"]
    assert "called as a whole, since a trace cannot follow them" in str(found)
    assert "depends on the value of a tensor" in found.leaves["blocks.0"]


def test_copies_of_a_net_with_leaves():
    torch.manual_seed(0)
    model, inputs = Net(decision), (torch.randn(4, 8),)
    net = mfx.momentumize(model, gamma=0.0)
    expected = train_step(net, inputs)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_bit_equal(train_step(other, inputs), expected)


def test_random_numbers_that_are_not_torchs_make_no_leaf():
    net = mfx.momentumize(Net(drawn), gamma=0.0)
    with pytest.warns(UserWarning, match="no chain was found"):
        net(torch.randn(4, 8))


class Samples(nn.Module):
    """Tokens drawn from those that a mask lets through, each one once: how many they are depends on values.

    Args:
        of_shares: the tokens have numbers that are positive.
    """

    def __init__(self, of_shares) -> None:
        super().__init__()
        self.of_shares = of_shares

    def forward(self, x, mask):
        level = x.detach()[:, 0].log().sum() if self.of_shares else x.detach().sum()
        drawn = torch.full_like(x[:, 0], float(level)).masked_fill(~mask, -1e30).repeat(6, 1)
        chosen = (drawn - torch.rand_like(drawn).log().neg().log()).argmax(-1).unique()
        return x[chosen], mask[chosen]


class Sampled(nn.Module):
    """As many tokens as a sampler leaves, which decide whether there is a third step."""

    def __init__(self, of_shares) -> None:
        super().__init__()
        self.samples, self.fs = Samples(of_shares), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x, _ = self.samples(x, torch.ones(x.shape[0], dtype=torch.bool))
        for i, f in enumerate(self.fs):
            if i < 2 or x.shape[0] > 4:
                x = x + f(x)
        return x


@pytest.mark.parametrize("of_shares", [False, True])
def test_a_module_whose_shapes_depend_on_values_is_no_leaf(of_shares):
    """It draws another number of tokens each time; made-up masks that let none through, and NaN, would hide that."""
    model, x = Sampled(of_shares), torch.randn(7, 8, generator=torch.Generator().manual_seed(0)).abs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = mfx.momentumize(model, gamma=0.0)
        counts = set()
        for seed in range(8):
            torch.manual_seed(seed)
            expected = model(x)
            torch.manual_seed(seed)
            assert torch.equal(net(x), expected)
            counts.add(len(expected))
    assert {True, False} == {count > 4 for count in counts}


class Scale(torch.autograd.Function):
    """With the old name of saved_tensors, an argument that is no tensor, and two outputs."""

    @staticmethod
    def forward(ctx, x, w, factor):
        ctx.factor = factor
        ctx.save_for_backward(x, w)
        return x * w * factor, x.sum()

    @staticmethod
    def backward(ctx, g, h):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, w = ctx.saved_variables
        return g * w * ctx.factor + h, (g * x * ctx.factor).sum(0), None


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x):
        y, total = Scale.apply(self.fc(x), self.w, 0.5)
        return x + y * total.sigmoid()


def test_an_autograd_function_is_a_node():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(*(Scaled() for _ in range(3))), (torch.randn(4, 8),)
    net = mfx.momentumize(model, gamma=0.0, capture="symbolic")
    assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]
    assert_bit_equal(train_step(pickle.loads(pickle.dumps(net)), inputs), train_step(model, inputs))


SIZES = {
    "unpacked": lambda x: x.reshape(*(int(size) for size in x.size())),
    "listed": lambda x: x.reshape(list(x.shape)),
    "ranged": lambda x: sum(x[:, i : i + 1] for i in range(x.shape[1])),
    "numpy": lambda x: x / numpy.prod(x.shape),
    "decided": lambda x: F.pad(x, (0, 0, 0, 4 - x.shape[1] % 4)) if x.shape[1] % 4 else x,
    "made": lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, 8, dtype=x.dtype, device=x.device)], 1),
    "formatted": lambda x: x * {"7x8": 2.0, "8x8": 3.0}[f"{x.shape[1]}x{x.shape[2]}"],
    "length": lambda x: x * len(x),
}


class ReadsSizes(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        self.read = read
        self.blocks = nn.ModuleList(Returns(lambda y: y) for _ in range(3))

    def forward(self, x):
        x = self.read(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("read", SIZES.values(), ids=SIZES)
def test_sizes_are_numbers_where_the_model_wants_them(read):
    torch.manual_seed(0)
    model = ReadsSizes(read)
    net = mfx.momentumize(model, gamma=0.0)
    for length in (7, 8):
        inputs = (torch.randn(2, length, 8),)
        assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


@pytest.mark.parametrize(
    "look, is_traced",
    [
        (lambda x: x * len(x), False),
        (lambda x: x + torch.from_numpy(numpy.sin(x.detach().numpy())), True),
    ],
    ids=["both have all steps", "Dynamo has none"],
)
def test_of_two_graphs_with_as_many_steps_dynamos_is_taken(look, is_traced):
    torch.manual_seed(0)
    net = mfx.momentumize(Net(look), gamma=0.9)
    net(torch.randn(5, 8))
    (graph,) = forward_of(net).table.graphs
    assert isinstance(graph.captured.binding, ByName) is is_traced
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.rnn, self.fc = kind(8, 8, num_layers=2, dropout=0.3, bidirectional=True), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.fc(self.rnn(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_branches_under_dynamo(kind):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Recurrent(kind), Recurrent(kind)), (torch.randn(5, 2, 8),)
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")
    for training in (True, False):
        model.train(training), net.train(training)
        assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [2]
