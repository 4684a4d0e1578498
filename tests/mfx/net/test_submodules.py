"""Parts of a net that are called by themselves, and models that are not one graph."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import mfx


class Encoder(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Model(nn.Module):
    """An encoder, and a head that another method uses."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 3), nn.ReLU())])

    def forward(self, x):
        return self.encoder(x).sum(-1)

    def classify(self, x):
        return self.heads[0](self.encoder(x))


class Block(nn.Module):
    """Two residual adds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + torch.tanh(self.first(x))
        return x + torch.tanh(self.second(x))


class Branching(nn.Module):
    """No one graph: what it does depends on a value."""

    def __init__(self):
        super().__init__()
        self.encoder, self.other = Encoder(), nn.Linear(4, 4)

    def forward(self, x):
        x = self.encoder(x)
        return self.other(x) if float(x.detach().sum()) > 0 else x


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def recurrence(layers, x, gamma):
    v = torch.zeros_like(x)
    for layer in layers:
        v = gamma * v + (1 - gamma) * torch.tanh(layer(x))
        x = x + v
    return x


def close(found, expected):
    # float32 roundings of values below 4, in at most 12 steps.
    torch.testing.assert_close(found, expected, rtol=0, atol=12 * 4 * 2.0**-23)


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_part_that_holds_a_chain_runs_it(capture, called_before):
    model, x = Model(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.5, capture=capture)
    if called_before:
        net(x)
    expected = recurrence(model.encoder.layers, x, 0.5)
    close(net.encoder(x), expected)
    close(net.classify(x), model.heads[0](expected))
    close(net(x), expected.sum(-1))


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_a_piece_of_a_chain_warns(capture):
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.5, capture=capture)
    net(x)
    with pytest.warns(UserWarning, match=r"mfx: 0 was called by itself.*piece of a chain"):
        out = net[0](x)
    assert torch.equal(out, model[0](x))
    net[0](x)  # warnings are errors here: there is no second one


def test_a_piece_called_before_it_is_known_what_it_is_a_piece_of():
    net = mfx.momentumize(nn.Sequential(Block(), Block()), gamma=0.5, capture="dynamo")
    with pytest.raises(
        mfx.MfxError, match=r"0 was called by itself before Sequential was captured.*Call the net first"
    ):
        net[0](torch.randn(2, 4))


def test_at_gamma_zero_a_piece_is_what_it_was():
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 4)
    for capture in ("symbolic", "dynamo"):
        net = mfx.momentumize(model, gamma=0.0, capture=capture)
        assert torch.equal(net[1](x), model[1](x))


class Nest(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Encoder(3)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.inner(x))


class Nests(nn.Module):
    """A chain whose branches hold chains."""

    def __init__(self):
        super().__init__()
        self.nests = nn.ModuleList(Nest() for _ in range(2))

    def forward(self, x):
        for nest in self.nests:
            x = x + nest(x)
        return x


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_a_chain_in_a_branch_called_by_itself(capture):
    model, x = Nests(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.5, capture=capture)
    net(x)
    close(net.nests[1].inner(x), recurrence(model.nests[1].inner.layers, x, 0.5))


def rewritten_per_module(model, x, **options):
    net = mfx.momentumize(model, **options)
    with pytest.warns(UserWarning, match=r"cannot be captured as one graph.*these chains were found: encoder\."):
        out = net(x)
    return net, out


def test_a_model_that_is_no_one_graph_is_rewritten_module_by_module():
    model, x = Branching(), torch.randn(2, 4)
    net, out = rewritten_per_module(model, x, gamma=0.5)
    state = recurrence(model.encoder.layers, x, 0.5)
    close(out, model.other(state) if state.sum() > 0 else state)
    (chain,) = mfx.explain(net).chains
    assert (chain.name, len(chain.steps)) == ("encoder", 4)
    assert list(mfx.graphs(net)) == ["encoder: train"]
    assert net.state_dict()._metadata[""]["mfx.gamma"] == {"encoder": (1, 2)}
    mfx.set_gamma(net, 0.0)
    assert torch.equal(net(x), model(x))


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_whatever_capture_is_asked_for_a_call_at_gamma_zero_is_no_error(capture):
    class InEvaluation(Branching):
        def forward(self, x):
            return self.encoder(x) if self.training else super().forward(x)

    model, x = InEvaluation(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    assert torch.equal(net(x), model(x))
    model.eval(), net.eval()
    with pytest.warns(UserWarning, match=r"cannot be .*these chains were found: encoder"):
        assert torch.equal(net(x), model(x))
    mfx.set_gamma(net, 0.5)
    with pytest.raises(mfx.MfxError, match="cannot be"):
        net(x)


@pytest.mark.filterwarnings("ignore:mfx")  # which tells what it is at gamma 0
@pytest.mark.parametrize("options", [{"capture": "symbolic"}, {"example_inputs": torch.ones(2, 4)}], ids=list)
def test_a_model_that_is_no_one_graph_at_all_is_an_error_at_once_but_for_gamma_zero(options):
    class Looks(Encoder):
        def forward(self, x):
            for row in x.tolist():
                x = super().forward(x) * len(row)
            return x

    model, x = Looks(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0, **options)
    assert torch.equal(net(x), model(x))
    with pytest.raises(mfx.MfxError, match="cannot be"):
        mfx.momentumize(model, gamma=0.5, **options)


def test_its_weights_in_a_net_that_may_become_one_graph():
    net, _ = rewritten_per_module(Branching(), torch.randn(2, 4), gamma=0.5)
    other = mfx.momentumize(Branching(), gamma=0.5)
    old = net.state_dict()
    del old._metadata[""]["mfx.chains"]  # an older checkpoint
    with pytest.warns(UserWarning, match="rewritten module by module.*before it is used"):
        other.load_state_dict(old)
    with pytest.warns(UserWarning, match="cannot be captured as one graph"):
        other(torch.randn(2, 4))
    other.load_state_dict(net.state_dict())  # warnings are errors here: now they are alike


def test_its_copies_are_rewritten_too():
    net, out = rewritten_per_module(Branching(), torch.ones(2, 4), gamma=0.5)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(torch.ones(2, 4)), out)


def test_an_error_of_the_call_is_not_taken_for_one_of_the_model():
    model = Branching()
    net = mfx.momentumize(model, gamma=0.5)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5))
    with pytest.warns(UserWarning, match="chains were found: encoder"):
        net(torch.randn(2, 4))


def test_explicit_routes_refuse_it():
    for capture in ("symbolic", "dynamo"):
        with pytest.raises(mfx.MfxError, match="Branching cannot be"):
            mfx.momentumize(Branching(), capture=capture)(torch.randn(2, 4))


def test_a_first_call_from_several_threads():
    model, x = Model(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.5, capture="dynamo")
    results = [None] * 4

    def call(number):
        results[number] = net(x).detach()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        close(result, recurrence(model.encoder.layers, x, 0.5).sum(-1))


class Caching(nn.Module):
    """Sets up a table at its first call, and prints, which Dynamo cannot follow."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.table, self.calls, self.seen = None, 0, []

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(4)
        self.calls += 1
        self.seen.append(x.shape[0])
        return self.encoder(x * self.table) * float(x.sum().item() > -1e9)


def test_what_a_model_sets_up_at_its_first_call_is_real():
    x = torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = mfx.momentumize(Caching(), gamma=0.5)
        out = net(x)
    assert type(out) is torch.Tensor
    assert type(net.table) is torch.Tensor
    assert net.calls == 1
