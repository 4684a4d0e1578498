"""A forward that is not one graph, and adds up steps itself: TorchDynamo's graphs of what lies between its breaks."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mfx
from mfx.net.forward import forward_of
from tests.mfx.net.test_decisions import DIM, Between, inputs, lengths, momentum
from tests.models.step import assert_bit_equal, train_step
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore:mfx.*rewritten each on its own")


def sizes(x):
    count = int((x[:, 0] > -1e9).sum())
    return torch.cat([x[:count], x[count:]])


def listed(x):
    return x + sum(x.detach().mean(0).tolist())


def through_numpy(x):
    return x + torch.from_numpy(numpy.tanh(x.detach().numpy()))


def scaled_by_numpy(x):
    return x / float(1 + x.detach().numpy().std())


def written(x):
    with open("/dev/null", "a") as file:
        file.write(f"{x.mean().item()}\n")
    return x


def numbers_of_some(x):
    chosen = torch.nonzero(x[:, 0] > 0).squeeze(1)
    return x.index_add(0, chosen, x[chosen] * 0.5) if len(chosen) > 0 else x


NAMED = {look.__name__: look for look in (sizes, listed, through_numpy, scaled_by_numpy, written, numbers_of_some)}


def made(look=sizes, gamma=0.0, **options):
    torch.manual_seed(0)
    model = Between(look)
    return model, mfx.momentumize(model, gamma=gamma, **options)


@sampled("look", NAMED, 3)
def test_at_gamma_0_the_pieces_are_the_models_own(look):
    model, net = made(look)
    for training in (True, False):
        model.train(training), net.train(training)
        for x in inputs():
            assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
            assert lengths(net) == [3, 3]


@sampled("look", NAMED, 2)
def test_with_momentum_each_piece_is_a_recurrence(look):
    torch.manual_seed(0)
    model = Between(look).double()
    net = mfx.momentumize(model, gamma=0.9, arithmetic="float")
    oracle = copy.deepcopy(model)
    oracle.loop = partial(momentum, 0.9)
    for training in (True, False):
        oracle.train(training), net.train(training)
        for x in inputs(dtype=torch.float64)[:2]:
            ours, theirs = train_step(net, (x,)), train_step(oracle, (x,))
            torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-9, atol=1e-9)  # as many roundings
            torch.testing.assert_close(ours.grads, theirs.grads, rtol=1e-8, atol=1e-8)
    mfx.set_gamma(net, 0.5)
    oracle.loop = partial(momentum, 0.5)
    torch.testing.assert_close(net(x), oracle(x), rtol=1e-9, atol=1e-9)


def test_signs_of_gamma_are_drawn_where_the_owner_of_the_steps_is_in_training():
    x = inputs()[0]
    model, net = made(gamma=mfx.BDIA(0.25), verify="raise")
    _, kept = made(gamma=mfx.BDIA(0.25), memory_budget=1.0)
    for _ in range(2):
        first = train_step(net, (x,))
        assert_bit_equal(first, train_step(kept, (x,)))
        assert not torch.equal(*first.outputs, *train_step(model, (x,)).outputs)
        model.eval(), net.eval()
        assert torch.equal(net(x), model(x))
        net.second.training = True  # of the list alone, which owns the steps
        assert not torch.equal(net(x), model(x))
        mfx.set_gamma(net, 0.5)
        assert not torch.equal(net.eval()(x), model(x))
        mfx.set_gamma(net, mfx.BDIA(0.25))
        assert torch.equal(net(x), model(x))
        model.train(), net.train()


def test_calls_that_are_alike_make_no_further_graphs():
    _, net = made()
    x = inputs()[0]
    for _ in range(2):
        train_step(net, (x,))
        count = len(forward_of(net).table.pieces.graphs)
    train_step(net, (x,))
    assert len(forward_of(net).table.pieces.graphs) == count


def test_explain_says_which_line_breaks_the_graph_and_what_it_costs():
    _, net = made()
    net(inputs()[0])
    found = mfx.explain(net)
    (line,) = found.breaks
    assert "int((x[:, 0] > -1e9).sum())" in line
    assert "first (3 steps) ends there" in line
    assert "not one graph" in str(found)
    assert found.to_dict()["breaks"] == [line]


def test_copies_make_pieces_of_their_own():
    model, net = made()
    x = inputs()[0]
    train_step(net, (x,)), train_step(model, (x,))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        own = copy.deepcopy(model)
        assert_bit_equal(train_step(copied, (x,)), train_step(own, (x,)))
        assert lengths(copied) == [3, 3]


def test_weights_say_which_chains_they_were_saved_with():
    _, net = made(gamma=0.9)
    net(inputs()[0])
    state = net.state_dict()
    assert set(state._metadata[""]["mfx.chains"]["chains"]) == {"first", "second"}
    assert set(state._metadata[""]["mfx.gamma"].values()) == {(9, 10)}


# --- the same chains in all calls -------------------------------------------------------------------------------------


class CutInTraining(Between):
    """In training, a line cuts a chain in two that is whole in evaluation."""

    def forward(self, x):
        x = self.loop(self.first, x)
        if self.training:
            x = sizes(x)
        return self.loop(self.second, x)


class CutInEvaluation(CutInTraining):
    def forward(self, x):
        x = self.loop(self.first, x)
        if not self.training:
            x = sizes(x)
        return self.loop(self.second, x)


def test_training_and_evaluation_have_the_same_chains_or_there_is_an_error():
    for first in (True, False):
        torch.manual_seed(0)
        net = mfx.momentumize(CutInTraining(sizes), gamma=0.9).train(first)
        net(inputs()[0])
        with pytest.raises(mfx.MfxError, match="other chains in one call than in another"):
            net.train(not first)(inputs()[0])


@pytest.mark.parametrize("make", [CutInTraining, CutInEvaluation])
def test_evaluation_with_other_pieces_is_the_model_itself_where_gamma_has_signs(make):
    for first in (True, False):
        torch.manual_seed(0)
        model = make(sizes)
        net = mfx.momentumize(model, gamma=mfx.BDIA(0.25))
        for training in (first, not first):
            model.train(training), net.train(training)
            assert torch.equal(net(inputs()[0]), model(inputs()[0])) is not training


class Early(Between):
    """A value decides on whether there is a second piece."""

    def forward(self, x):
        x = self.loop(self.first, x)
        if int((x > 100).sum().item()) > 3:
            return x
        return self.loop(self.second, sizes(x))


def test_a_call_without_a_piece_that_others_have_is_an_error():
    torch.manual_seed(0)
    net = mfx.momentumize(Early(sizes), gamma=0.9)
    small, large, *_ = inputs()
    net(small)
    with pytest.raises(mfx.MfxError, match="its pieces are not the same in both"):
        net(1000 * large)


def test_in_evaluation_pieces_may_be_missing_where_gamma_has_signs():
    torch.manual_seed(0)
    model = Early(sizes)
    for blocks in (model.first, model.second):  # that do not read the training mode
        for index in range(len(blocks)):
            blocks[index] = nn.Linear(DIM, DIM)
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25))
    small, large, *_ = inputs()
    assert not torch.equal(net(small), model(small))
    model.eval(), net.eval()
    for x in (small, 1000 * large):
        assert torch.equal(net(x), model(x))
    with pytest.raises(mfx.MfxError, match="its pieces are not the same in both"):
        net.train()(1000 * large)


class Counted(TorchDispatchMode):
    """Counts the matrix products of a layer."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
def test_under_a_dispatch_mode_a_call_is_what_it_is_elsewhere(first, gamma):
    x = inputs()[0]
    model, net = made(gamma=gamma)
    _, other = made(gamma=gamma)
    if not first:
        train_step(net, (x,))
    expected = train_step(other, (x,))
    with Counted() as seen:
        outcome = train_step(net, (x,))
    assert_bit_equal(outcome, expected)
    if gamma == 0.0:
        assert_bit_equal(outcome, train_step(model, (x,)))
    with Counted() as plain, torch.no_grad():
        model(x)
    with Counted() as again, torch.no_grad():
        net(x)
    assert plain.count == again.count < seen.count  # the mode sees what is recomputed, too


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context")
def test_under_a_selective_checkpoint_a_first_call_is_what_it_is_elsewhere():
    x = inputs()[0].requires_grad_()
    _, net = made(gamma=0.9)
    expected = train_step(made(gamma=0.9)[1], (x,))
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
    around = nn.Module()
    around.net = net
    around.forward = lambda x: checkpoint(net, x, use_reentrant=False, context_fn=context)
    outcome = train_step(around, (x,))
    assert torch.equal(outcome.outputs[0], expected.outputs[0])
    assert all(torch.equal(outcome.grads[f"net.{name}"], grad) for name, grad in expected.grads.items())


def test_tensors_without_values_have_no_pieces():
    x = inputs()[0]
    _, net = made(look=listed, gamma=0.9)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(mfx.MfxError, match="without values"):
        net(mode.from_tensor(x))


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "fail_on_recompile"])
def test_stances_of_torch_compile_are_not_for_the_pieces(stance):
    _, net = made(gamma=0.9)
    net.eval()
    x = inputs()[0]
    expected = net(x)
    with torch.compiler.set_stance(stance):
        assert torch.equal(net(x), expected)
        assert torch.equal(net(x[:3]), net(x)[:3])


def test_a_break_in_a_loop_leaves_the_modules_each_on_its_own():
    class InTheLoop(Between):
        def forward(self, x):
            for block in self.first:
                x = sizes(x + block(x))
            return self.loop(self.second, x)

    torch.manual_seed(0)
    model = InTheLoop(lambda x: x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = mfx.momentumize(model, gamma=0.0)
        for x in inputs():
            assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
    assert "int((x[:, 0] > -1e9).sum())" in " ".join(mfx.explain(net).breaks)


class Watched(nn.Module):
    """A stage with a loop of its own that decides on values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            if x.abs().max() > 1e6:
                raise OverflowError
            x = x + block(x)
        return x


def test_a_module_called_at_a_break_runs_graphs_of_its_own():
    torch.manual_seed(0)
    model = Between(sizes)
    model.look = StagedLook(Watched())
    net = mfx.momentumize(model, gamma=0.0)
    for x in inputs():
        assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
        assert lengths(net) == [3, 3, 3]


class StagedLook(nn.Module):
    def __init__(self, stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return self.stage(sizes(x))
