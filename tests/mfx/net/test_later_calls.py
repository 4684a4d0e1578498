"""Calls after the first that are not one graph, or have other chains: as first calls, and of the same network."""

import copy
import warnings
from itertools import permutations

import pytest
import torch
from torch import nn

import mfx
from tests.sampling import grid, sampled

MODULE_BY_MODULE = pytest.mark.filterwarnings("ignore:mfx. .* cannot be captured as one graph")


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.Tanh())

    def forward(self, x):
        return x + self.f(x)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(8, 8)


class PostProcessing(Base):
    """One graph in training, decoding in evaluation."""

    def forward(self, x):
        y = self.head(self.body(x))
        if self.training:
            return y
        return y[y > 0.0] if float((y > 0.0).sum().detach()) > 0 else y.new_zeros(0)


class LossInTraining(Base):
    """One graph in evaluation only."""

    def forward(self, x):
        y = self.head(self.body(x))
        return y * float(y.sum().item() > -1e9) if self.training else y


class MaskLookedAt(Base):
    def forward(self, x, mask=None):
        if mask is not None and bool((mask == 0).all()):
            return x
        return self.head(self.body(x))


class Search(Base):
    """A beam search in evaluation."""

    def forward(self, x, steps=1):
        for _ in range(steps):
            x = self.head(self.body(x))
            if not self.training and x.norm().item() < 1e-6:
                break
        return x


class Lists(Base):
    def forward(self, xs):
        return sum(self.head(self.body(x)).sum() for x in xs)


class Dicts(Base):
    def forward(self, batch):
        y = self.head(self.body(batch["x"]))
        if "mask" in batch:
            y = y * batch["mask"]
        return y * 2 if "weights" in batch and batch["weights"].min().item() > -1e9 else y


class Aux(Base):
    """An output in training only, of a chain of its own."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x):
        y = self.head(self.body(x))
        return y + self.aux(y) if self.training else y


def x_of(seed=1):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


TRAIN, EVAL = True, False
KINDS = {
    "post-processing": (PostProcessing, [(TRAIN, (x_of(),)), (EVAL, (x_of(),))]),
    "a loss in training": (LossInTraining, [(TRAIN, (x_of(),)), (EVAL, (x_of(),))]),
    "a mask": (MaskLookedAt, [(TRAIN, (x_of(),)), (EVAL, (x_of(),)), (TRAIN, (x_of(), torch.ones(4)))]),
    "a search": (Search, [(TRAIN, (x_of(),)), (EVAL, (x_of(), 2)), (EVAL, (x_of(), 3))]),
    "lists": (Lists, [(TRAIN, ([x_of(), x_of(2)],)), (TRAIN, ([x_of()] * 3,)), (EVAL, ([x_of()],))]),
    "dicts": (
        Dicts,
        [
            (TRAIN, ({"x": x_of()},)),
            (EVAL, ({"x": x_of(), "mask": torch.ones(8)},)),
            (EVAL, ({"x": x_of(), "weights": torch.ones(8)},)),
        ],
    ),
    "another output": (Aux, [(TRAIN, (x_of(),)), (EVAL, (x_of(),))]),
}
ORDERS = {"": lambda calls: calls, " in reverse": lambda calls: calls[::-1]}
IN_ANY_ORDER = {
    kind + name: (build, order(calls)) for kind, (build, calls) in KINDS.items() for name, order in ORDERS.items()
}


def called(net, calls):
    found = []
    for training, args in calls:
        net.train(training)
        y = net(*copy.deepcopy(args))
        if training:
            net.zero_grad()
            y.sum().backward()
            found += [p.grad for p in net.body.parameters()]
        found.append(y.detach())
    return [*found, *(buffer.clone() for buffer in net.buffers())]


@MODULE_BY_MODULE
@sampled("build, calls", IN_ANY_ORDER, 4)
def test_at_gamma_zero_each_is_the_models(build, calls):
    torch.manual_seed(0)
    model = build()
    net = mfx.momentumize(copy.deepcopy(model).train(calls[0][0]), gamma=0.0)
    for _ in range(2):
        for a, b in zip(called(net, calls), called(model, calls), strict=True):
            assert torch.equal(a, b)


@MODULE_BY_MODULE
@sampled("build, calls", IN_ANY_ORDER, 4)
def test_with_momentum_each_is_of_one_network(build, calls):
    """The result of a call does not depend on the calls before."""
    torch.manual_seed(0)
    model = build()
    together = mfx.momentumize(copy.deepcopy(model).train(calls[0][0]), gamma=0.5)
    found = called(together, calls)
    alone = []
    buffers = model.state_dict()
    for call in calls:
        net = mfx.momentumize(copy.deepcopy(model).train(call[0]), gamma=0.5)
        net.load_state_dict(dict(buffers))  # without metadata, and so without warnings
        alone += called(net, [call])[: -len(list(net.buffers()))]
        buffers = net.state_dict()
    for a, b in zip(found, alone, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # exact arithmetic or float: 40 bits or float32's 24
    assert {chain.name: len(chain.steps) for chain in mfx.explain(together).chains}["body"] == 4


class Spanning(nn.Module):
    """The sums are the model's own, so that no module holds the chain."""

    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for fc in self.fcs:
            x = x + torch.tanh(fc(x))
        return x if self.training or float(x.detach().sum()) > -1e9 else -x


class Iterated(Base):
    """Evaluation calls the blocks of the chain one by one."""

    def forward(self, x):
        if self.training:
            return self.body(x)
        for block in self.body:
            x = block(x)
        return x if float(x.detach().sum()) > -1e9 else -x


@MODULE_BY_MODULE
@pytest.mark.parametrize("build", [Spanning, Iterated])
@pytest.mark.parametrize("defaults_first", [False, True])
def test_a_chain_that_no_module_holds_runs_in_pieces(build, defaults_first):
    """The looked-at value follows the chain, so that both modes have the same one."""
    torch.manual_seed(0)
    model = build()
    net = mfx.momentumize(model.train(defaults_first), gamma=0.5)
    net.train()(x_of())
    net.eval()
    model.eval()
    expected = by_recurrence(model.fcs if build is Spanning else model.body, x_of(), 0.5)
    for gamma, wanted in ((0.5, expected), (0.0, model(x_of())), (0.5, expected)):
        mfx.set_gamma(net, gamma)
        for _ in range(2):
            torch.testing.assert_close(net(x_of()), wanted, rtol=0, atol=0 if gamma == 0 else 1e-6)


def by_recurrence(steps, x, gamma):
    """The plain recurrence; a step is a module f with tanh behind it, or a block x + f(x)."""
    x, v = x.double(), torch.zeros_like(x).double()
    for step in steps.double():
        f = torch.tanh(step(x)) if isinstance(step, nn.Linear) else step(x) - x
        v = gamma * v + (1 - gamma) * f
        x = x + v
    steps.float()
    return x.float()


@pytest.mark.parametrize("build", [Spanning, Iterated])
def test_pieces_come_first_and_one_graph_after_them(build):
    torch.manual_seed(0)
    net = mfx.momentumize(build().eval(), gamma=0.5)
    with pytest.warns(UserWarning, match="cannot be captured as one graph"):
        in_pieces = net(x_of()).detach()
    assert torch.equal(net(x_of()), in_pieces)  # warnings are errors here
    in_training = net.train()(x_of())
    if build is Spanning:  # without BatchNorm
        assert torch.equal(in_training, in_pieces)


def test_the_warning_comes_once():
    net = mfx.momentumize(PostProcessing(), gamma=0.5)
    net(x_of())
    net.eval()
    with pytest.warns(UserWarning, match=r"cannot be captured as one graph.*chains were found: body"):
        net(x_of())
    net(x_of())
    net.train()(x_of())
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]
    assert list(mfx.graphs(net)) == ["train", "body: eval"]
    assert net.state_dict()._metadata[""]["mfx.gamma"] == {"body": (1, 2)}


def test_explicit_routes_refuse_a_later_call_too():
    for capture in ("symbolic", "dynamo"):
        net = mfx.momentumize(PostProcessing(), capture=capture)
        net(x_of())
        with pytest.raises(mfx.MfxError, match="PostProcessing cannot be"):
            net.eval()(x_of())


class Crops(nn.Module):
    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, crops):
        outs = []
        for x in crops:
            for fc in self.fcs:
                x = x + torch.tanh(fc(x))
            outs.append(x)
        return outs


@grid(2, gamma=[0.0, 0.5], numbers=list(permutations((1, 2, 3)))[::2])
def test_the_number_of_uses_of_a_chain(numbers, gamma):
    torch.manual_seed(0)
    model = Crops()
    net = mfx.momentumize(model, gamma=gamma)
    one = mfx.momentumize(model, gamma=gamma)([x_of()])[0]
    for number in numbers:
        for y in net([x_of()] * number):
            torch.testing.assert_close(y, one, rtol=0, atol=1e-6)


class SubSearch(Base):
    """A submodule whose chain runs in training only, in a net that is never one graph."""

    def __init__(self):
        super().__init__()
        self.body = Switched(self.body)

    def forward(self, x):
        x = self.body(x)
        return x if float(x.detach().sum()) > -1e9 else -x


class Switched(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        return self.blocks(x) if self.training else torch.relu(x)


@pytest.mark.parametrize("first", [True, False])
def test_a_submodule_without_chains_in_one_mode_has_them_in_the_other(first):
    net = mfx.momentumize(SubSearch(), gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for training in (first, not first, True):
            net.train(training)(x_of())
    assert [(chain.name, len(chain.steps)) for chain in mfx.explain(net).chains] == [("body.blocks", 4)]
