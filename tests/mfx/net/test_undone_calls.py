"""A call that was not on the path expected is undone and made again: what that must not change, where it cannot be."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from functools import partial

import numpy.random as numpy_random
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mfx
from mfx.modules.call_state import CallState
from tests.mfx.net.test_decisions import DIM, Between, inputs, item, lengths, maximum, momentum, residual
from tests.models.step import assert_bit_equal, train_step


def made(look=maximum, gamma=0.0, **options):
    torch.manual_seed(0)
    model = Between(look)
    return model, mfx.momentumize(model, gamma=gamma, **options)


def test_all_random_states_and_buffers_are_put_back():
    model = Between(maximum)
    model.counts = {"calls": 0}
    before = CallState(model, (), python=True)
    seen = [torch.get_rng_state(), random.getstate(), numpy_random.get_state()[1].tolist()]  # noqa: NPY002
    model(torch.randn(4, DIM)), random.random(), numpy_random.random()  # noqa: NPY002
    model.counts["calls"] += 1
    before.put_back()
    assert torch.equal(torch.get_rng_state(), seen[0])
    assert random.getstate() == seen[1]
    assert numpy_random.get_state()[1].tolist() == seen[2]  # noqa: NPY002
    assert model.counts == {"calls": 0}
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), Between(maximum).buffers(), strict=True))


def test_a_changed_argument_cannot_be_put_back():
    x = torch.randn(4, DIM)
    before = CallState(Between(maximum), (x,), python=False)
    x.add_(1)
    with pytest.raises(mfx.MfxError, match="changed an argument or a parameter in place"):
        before.put_back()


@pytest.mark.parametrize("options", [{"memory_budget": 0.5}, {"memory_budget": 1.0}, {"recompute": "all"}])
def test_any_budget(options):
    model, net = made(**options)
    for x in [*inputs(), *inputs()]:
        assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))


def test_without_gradients_and_under_autocast():
    model, net = made()
    for x in inputs():
        with torch.no_grad(), torch.random.fork_rng(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            assert torch.equal(net(x), expected)


def test_a_checkpoint_around_the_net_sees_the_right_path_only():
    model, net = made()
    model.eval(), net.eval()  # a recomputation of torch's stops somewhere in the last block
    for x in inputs():
        steps = []
        for module in (model, net):
            inside = nn.ModuleList([module])
            inside.forward = lambda x, module=module: checkpoint(module, x, use_reentrant=False)
            steps.append(train_step(inside, (x,)))
        assert_bit_equal(*steps)


def test_saved_tensor_hooks_see_the_right_path_only():
    _, net = made()
    counts = []
    for x in inputs()[:3]:  # the second call is not on the path expected, the third is
        packed = []
        with saved_tensors_hooks(lambda tensor, packed=packed: packed.append(tensor) or tensor, lambda tensor: tensor):
            net(x)
        counts.append(len(packed))
    assert counts[1] == counts[2] > 0


def test_hooks_that_ran_in_vain_are_told():
    _, net = made()
    net.first[0][0].register_forward_hook(lambda *_: None)
    small, large, *_ = inputs()
    net(small)
    with pytest.warns(UserWarning, match=r"forward hooks on first\.0\.0 may run again"):
        net(large)


def test_copies_take_their_own_paths():
    _, net = made()
    small, large, *_ = inputs()
    net(small), net(large)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        copied.load_state_dict(net.state_dict())
        for x in (large, small):
            assert_bit_equal(train_step(copied, (x,)), train_step(net, (x,)))
            assert lengths(copied) == [3, 3]


# --- errors of the model's own ----------------------------------------------------------------------------------------


def refuses(x):
    if not x.abs().max() < 20:
        raise OverflowError("too large")
    return x


def test_an_error_that_the_model_raises_is_its_own():
    model, net = made(refuses)
    small, large, *_ = inputs()
    assert_bit_equal(train_step(net, (small,)), train_step(model, (small,)))
    for _ in range(2):
        with pytest.raises(OverflowError, match="too large"):
            net(large)
        assert_bit_equal(train_step(net, (small,)), train_step(model, (small,)))
    assert lengths(net) == [3, 3]


# --- too many paths, and other refusals -------------------------------------------------------------------------------


class Parts(Between):
    """The loops are modules of their own."""

    def __init__(self, look) -> None:
        super().__init__(look)
        self.first, self.second = Loop(self.first), Loop(self.second)
        self.loop = called


def called(module, x):
    return module(x)


class Loop(nn.Module):
    def __init__(self, blocks) -> None:
        super().__init__()
        self.blocks, self.run = blocks, residual

    def forward(self, x):
        return self.run(self.blocks, x)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_beyond_eight_paths_modules_are_rewritten_each_on_its_own(gamma):
    torch.manual_seed(0)
    model = Parts(signs).double().eval()
    net = mfx.momentumize(model, gamma=gamma, arithmetic="float")
    model.first.run = model.second.run = partial(momentum, gamma)
    calls = torch.randn(32, 6, DIM, dtype=torch.float64)
    with pytest.warns(UserWarning, match="takes more than 8 paths.*rewritten each on its own"):
        results = [net(x) for x in calls]
    torch.testing.assert_close(results, [model(x) for x in calls], rtol=1e-9, atol=1e-9)  # as many roundings


def signs(x):
    for column in range(4):
        x = x + column if x[0, column] > x[0, 5] else x - column
    return x


def test_beyond_eight_paths_chains_in_no_module_run_in_pieces():
    torch.manual_seed(0)
    model = Between(signs).double().eval()
    net = mfx.momentumize(model, gamma=0.9, arithmetic="float")
    model.loop = partial(momentum, 0.9)
    calls = torch.randn(24, 6, DIM, dtype=torch.float64)
    with pytest.warns(UserWarning, match="takes more than 8 paths"):
        results = [net(x) for x in calls]
    torch.testing.assert_close(results, [model(x) for x in calls], rtol=1e-9, atol=1e-9)  # as many roundings
    assert lengths(net) == [3, 3]


class Writes(Between):
    def forward(self, x):
        x.mul_(2)
        return super().forward(x)


def test_a_change_of_an_argument_is_a_reason_against_paths():
    torch.manual_seed(0)
    model = Writes(maximum)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net = mfx.momentumize(model, gamma=0.0)
        for x in inputs():
            one, other = x.clone(), x.clone()
            assert_bit_equal(train_step(net, (one,)), train_step(model, (other,)))
            assert torch.equal(one, other)
    assert any("changes x in place" in str(warning.message) for warning in told)


class OnlyInTraining(Between):
    """In training, a decision cuts a chain in two that is whole in evaluation."""

    def forward(self, x):
        for number, block in enumerate(self.first):
            if self.training and number == 1 and x.abs().max() > 20:
                x = x / 10
            x = x + block(x)
        return x


def test_training_and_evaluation_have_the_same_chains_or_there_is_an_error():
    torch.manual_seed(0)
    net = mfx.momentumize(OnlyInTraining(maximum, depth=4), gamma=0.9)
    small, large, *_ = inputs()
    net(small)
    net.eval()(small)
    net.train()
    with pytest.raises(mfx.MfxError, match="other chains in one call than in another"):
        net(large)


def test_paths_may_have_chains_of_their_own():
    class Cut(OnlyInTraining):
        training = True

    torch.manual_seed(0)
    model = Cut(maximum, depth=4)
    net = mfx.momentumize(model, gamma=0.0)
    small, large, *_ = inputs()
    for x, expected in [(small, [4]), (large, [3]), (small, [4])]:
        assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
        assert lengths(net) == expected


@pytest.mark.zoo  # torch.compile takes seconds
def test_compiled_code_around_the_net():
    model, net = made(item)
    model.eval(), net.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a graph break
        compiled = torch.compile(lambda x: net(x) + 1, backend="eager")
        for x in inputs():
            assert torch.equal(compiled(x), model(x) + 1)
