"""A model that decides on the values of tensors: one graph per path, and each call takes the path of its own values."""

from __future__ import annotations

import copy
import inspect
import logging
import random
import sys
import time
import warnings
from functools import partial

import numpy
import pytest
import torch
from torch import nn

import mfx
from mfx.capture import decisions
from mfx.modules import call_state
from mfx.net import decided_call
from tests.mfx.net.asserting import asserted
from tests.models.step import assert_bit_equal, train_step
from tests.sampling import sampled

DIM = 8


def residual(blocks, x):
    for block in blocks:
        x = x + block(x)
    return x


def momentum(gamma, blocks, x):
    """The recurrence of the paper."""
    v = torch.zeros_like(x)
    for block in blocks:
        v = gamma * v + (1 - gamma) * block(x)
        x = x + v
    return x


class Between(nn.Module):
    """Two loops of blocks, and between them one line that ``look`` has; what came before it must be undone."""

    def __init__(self, look, depth=3) -> None:
        super().__init__()

        def block():
            return nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, DIM), nn.GELU(), nn.Dropout(0.2))

        self.first, self.second = (nn.ModuleList(block() for _ in range(depth)) for _ in range(2))
        self.middle = nn.Linear(DIM, DIM)
        self.look, self.loop = look, residual

    def forward(self, x):
        x = self.loop(self.first, x)
        x = self.middle(self.look(x))
        return self.loop(self.second, x)


def maximum(x):
    return x / x.max() if x.max() > 20 else x


def item(x):
    if x.abs().mean().item() > 20:
        x = x / 10
    return x


def through_numpy(x):
    if not numpy.less(numpy.abs(x.detach().numpy()), 20).all():
        x = x.clamp(-20, 20)
    return x


def tried(x):
    try:
        if (x.abs() > 20).any():
            raise ValueError("large")
    except ValueError:
        x = torch.tanh(x)
    return x


def looped(x):
    while x.abs().max() > 20:
        x = x / 2
    return x


def several(x):
    for column in range(4):
        if x[:, column].sum() > 0:
            x = x + 1
    return x


def parts(x):
    for size in (2, 4):
        yield x[:, size:].abs().mean() > 20


def generator(x):
    for large in parts(x):
        if large:
            x = x * 0.1
    return x


def both(x):
    return x / 10 if (x.abs() > 20).any() and not (x.abs() > 1e6).any() else x


NAMED = {look.__name__: look for look in (maximum, item, through_numpy, tried, looped, several, generator, both)}


def inputs(seed=0, *, dtype=torch.float32):
    """A call on either path, and both again."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(6, DIM, generator=generator, dtype=dtype)
    return [small, 100 * small, 100 * small, small]


def lengths(net, *call):
    return sorted(len(chain.steps) for chain in mfx.explain(net, *call).chains)


@sampled("look", NAMED, 4)
def test_at_gamma_0_both_paths_are_the_models_own(look):
    torch.manual_seed(0)
    model = Between(look)
    net = mfx.momentumize(model, gamma=0.0)
    for training in (True, False):
        model.train(training), net.train(training)
        for x in inputs():
            assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
            assert lengths(net) == [3, 3]


@sampled("look", NAMED, 3)
def test_with_momentum_both_paths_are_those_of_the_recurrence(look):
    torch.manual_seed(0)
    model = Between(look).double()
    net = mfx.momentumize(model, gamma=0.9, arithmetic="float")
    oracle = copy.deepcopy(model)
    oracle.loop = partial(momentum, 0.9)
    for training in (True, False):
        oracle.train(training), net.train(training)
        for x in inputs(dtype=torch.float64):
            ours, theirs = train_step(net, (x,)), train_step(oracle, (x,))
            torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-9, atol=1e-9)  # as many roundings
            torch.testing.assert_close(ours.grads, theirs.grads, rtol=1e-8, atol=1e-8)
            assert torch.equal(ours.rng, theirs.rng)


# --- prints and logs --------------------------------------------------------------------------------------------------


def prints(x):
    print("mean", x.mean(), sep=": ")
    return x


def prints_text(x):
    print(f"mean {x.mean().item():.3f}", "of " + str(x.sum()) + f" {x.shape[1]} columns")
    return x


def logs(x):
    logging.getLogger("model").warning("mean %s", x.mean())
    logging.getLogger("model").info("mean %s", x.mean())  # which nobody wants to know
    return x


def prints_and_decides(x):
    print("before", x.mean())
    if x.max() > 20:
        print("large")
        x = x / 10
    return x


class InBranches(Between):
    """A model that prints or logs in each branch."""

    def __init__(self, look) -> None:
        super().__init__(lambda x: x)
        for block in (*self.first, *self.second):
            block.append(Says(look))


class Says(nn.Module):
    def __init__(self, look) -> None:
        super().__init__()
        self.look = look

    def forward(self, x):
        return self.look(x)


@pytest.mark.parametrize("make", [Between, InBranches])
@pytest.mark.parametrize("look", [prints, prints_text, logs, prints_and_decides])
def test_what_a_model_says_is_said_once_in_each_call(look, make, capsys, caplog):
    torch.manual_seed(0)
    model = make(look)
    net = mfx.momentumize(model, gamma=0.0)
    said = []
    for net_or_model in (model, net):
        for x in inputs():
            train_step(net_or_model, (x,))
        said.append((capsys.readouterr().out, [record.getMessage() for record in caplog.records]))
        caplog.clear()
    assert said[0] == said[1]
    assert any(said[0])
    assert lengths(net) == [3, 3]


# --- which chains there are -------------------------------------------------------------------------------------------


class MaskedEncoder(nn.Module):
    """An encoder that looks at its mask once, as protein language models do."""

    def __init__(self, depth=6) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, tokens):
        mask = tokens.eq(0)
        x = self.embed(tokens)
        x = x * (1 - mask.unsqueeze(-1).type_as(x))
        if not mask.any():
            mask = None
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.mix = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())

    def forward(self, x, mask):
        y = self.norms[0](x)
        x = x + self.mix(y, y, y, key_padding_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


def test_an_encoder_that_looks_at_its_mask_once_is_one_chain():
    torch.manual_seed(0)
    model = MaskedEncoder()
    net = mfx.momentumize(model, gamma=0.0)
    whole = torch.tensor([[1, 2, 3, 4]])
    for training in (True, False):
        model.train(training), net.train(training)
        for tokens in (whole, whole.clamp(max=3) - 1, whole):
            assert_bit_equal(train_step(net, (tokens,)), train_step(model, (tokens,)))
            assert lengths(net) == [12]


class InTheLoop(Between):
    """The decision stands between two steps of one chain."""

    def forward(self, x):
        for block in self.first:
            if x.abs().max() > 1e3:
                raise ArithmeticError("it explodes")
            x = x + block(x)
        return x


def test_a_decision_between_two_steps_does_not_cut_the_chain():
    torch.manual_seed(0)
    model = InTheLoop(maximum)
    net = mfx.momentumize(model, gamma=0.0)
    for x in inputs():
        assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
        assert lengths(net) == [3]
    with pytest.raises(ArithmeticError, match="it explodes"):
        net(1e5 * inputs()[0])


def test_in_evaluation_a_call_may_return_early():
    class Early(Between):
        def forward(self, x):
            x = self.loop(self.first, x)
            if not self.training and x.abs().max() < 20:
                return x
            return self.loop(self.second, x)

    torch.manual_seed(0)
    model = Early(maximum)
    net = mfx.momentumize(model, gamma=0.0)
    for training in (True, False):
        model.train(training), net.train(training)
        for x in inputs():
            assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))


def test_a_module_in_a_branch_that_decides_is_called_as_a_whole():
    torch.manual_seed(0)
    model = InBranches(lambda x: x / 2 if x.max() > 1 else x)
    net = mfx.momentumize(model, gamma=0.0)
    for x in inputs():
        assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
    found = mfx.explain(net)
    assert found.leaves.keys() == {f"{loop}.{i}.4" for loop in ("first", "second") for i in range(3)}
    assert not found.conditions


def test_random_decisions_of_python_are_no_condition():
    class Drops(Between):
        def forward(self, x):
            for block in self.first:
                if random.random() > 0.5:
                    x = x + block(x)
            return self.look(x)

    model = Drops(maximum)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is left to rewrite
        net = mfx.momentumize(model, gamma=0.0)
        for seed, x in enumerate(inputs()):
            random.seed(seed)
            expected = train_step(model, (x,))
            random.seed(seed)
            assert_bit_equal(train_step(net, (x,)), expected)


def test_explain_says_where_a_model_decides():
    net = mfx.momentumize(Between(maximum), gamma=0.0)
    found = mfx.explain(net, inputs()[0])
    assert found.to_dict()["conditions"] == list(found.conditions)
    assert "decided in each call anew" in str(found)
    assert "return x / x.max() if x.max() > 20 else x (here False)" in " ".join(str(found).split())
    assert found.estimate is not None


def test_before_there_is_an_input_conditions_are_false():
    torch.manual_seed(0)
    model = Between(maximum).eval()
    module = mfx.trace(model)
    small, large, *_ = inputs()
    assert torch.equal(module(small), model(small))
    with pytest.raises(mfx.MfxError, match="a condition came out as True in a graph that is for False"):
        module(large)


# --- other lines that a trace has to follow ---------------------------------------------------------------------------


def of_experts(x):
    for column in range(2):
        chosen = torch.where(x[:, column] > 0)[0]
        if chosen.numel():
            x = x.index_add(0, chosen, 0.5 * x[chosen])
    return x


def with_truth_itself(x):
    match (x.mean() > 0).item():
        case True:
            return x + 1
        case False:
            return x - 1


def counted(x):
    count = torch.tensor(0)
    while count < 3:
        x, count = x + 1, count + 1
    return x


def masked(x):
    mask = x > 20
    return x.masked_fill(mask, 20.0) if mask.any() else x


def none_chosen(x):
    chosen = torch.nonzero(x[:, 0] > 20).squeeze(1)
    return x if chosen.numel() == 0 else x.index_add(0, chosen, x[chosen])


def while_compiling(x):
    return 2 * x if torch.compiler.is_compiling() else 3 * x


class OwnTensor(torch.Tensor):
    pass


def of_a_subclass(x):
    return 2 * x if isinstance(x, OwnTensor) else x


OTHERS = {
    look.__name__: look
    for look in (
        of_experts,
        with_truth_itself,
        counted,
        asserted,
        masked,
        none_chosen,
        while_compiling,
        of_a_subclass,
    )
}


@sampled("look", OTHERS, 3)
def test_other_lines_keep_both_chains(look):
    torch.manual_seed(0)
    model = Between(look)
    net = mfx.momentumize(model, gamma=0.0)
    for training in (True, False):
        model.train(training), net.train(training)
        for x in inputs():
            assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
            assert sum(lengths(net)) >= 6


class LeavesEarly(Between):
    """The number of blocks depends on what they have computed."""

    def forward(self, x):
        for block in (*self.first, *self.second):
            x = x + block(x)
            if x.abs().mean() > 20:
                break
        return x


def test_a_loop_that_is_left_early_has_a_graph_per_length():
    torch.manual_seed(0)
    model = LeavesEarly(maximum)
    net = mfx.momentumize(model, gamma=0.0)
    for x, expected in zip(inputs(), [[6], [], [], [6]], strict=True):
        assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))
        assert lengths(net) == expected


class Warns(Between):
    """Warns in each call, and looks at the clock."""

    def forward(self, x):
        start = time.perf_counter()
        x = self.loop(self.first, x)
        warnings.warn(f"the mean is {x.mean():.3f}", FutureWarning, stacklevel=1)
        x = self.loop(self.second, x)
        print(time.perf_counter() > start)
        return x


def test_warnings_and_clocks_are_those_of_each_call(capsys):
    torch.manual_seed(0)
    model = Warns(maximum)
    net = mfx.momentumize(model, gamma=0.0)
    for x in inputs():
        told = []
        for module in (model, net):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_step(module, (x,))
            told.append([(str(w.message), w.category, w.filename, w.lineno) for w in caught])
        assert told[0] == told[1]
        assert len(told[0]) == 1
    assert lengths(net) == [6]
    assert set(capsys.readouterr().out.split()) == {"True"}


class Undecided(nn.Module):
    """A chain, with a line in front of it."""

    def __init__(self, look) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.look = look

    def forward(self, x):
        return residual(self.blocks, self.look(x))


def functions_called(function):
    """The functions of the files for decisions that a call runs, by name."""
    files = {inspect.getsourcefile(module) for module in (decided_call, decisions, call_state)}
    called = []

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename in files:
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("look, called", [(torch.tanh, ["run_decided", "_found"]), (maximum, ["check_decision"])])
def test_a_call_without_conditions_pays_for_none(look, called):
    """Nothing is noted to be put back, and nothing is checked: a later call asks for the graph, and runs it."""
    net = mfx.momentumize(Undecided(look))
    x = torch.randn(3, DIM)
    net(x)
    found = functions_called(lambda: net(x))
    assert found == called if look is torch.tanh else {"run_decided", "__init__", *called} <= set(found)
