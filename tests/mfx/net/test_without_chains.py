"""Models in which no chain was found so far: left alone only where no call can have one, and not slower."""

import sys

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import Block as TwoAdds


def blocks(count=4):
    return nn.Sequential(*(Block() for _ in range(count)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = blocks(), blocks()


class Optional(Base):
    def forward(self, image=None, text=None):
        image = image if image is None else self.a(image)
        return image if text is None else self.b(text)


class Labels(Base):
    def forward(self, x, labels=None):
        return x.tanh() if labels is None else self.a(x) - labels


class Extras(Base):
    def forward(self, x, **extras):
        return self.a(x) * extras["scale"] if extras else x.tanh()


class More(Base):
    def forward(self, x, *more):
        return self.a(x) if more else x.tanh()


class InTraining(Base):
    def forward(self, x):
        return self.a(x) if self.training else x.tanh()


class InEvaluation(Base):
    def forward(self, x):
        return x.tanh() if self.training else self.a(x)


X = torch.linspace(-1, 1, 24).view(3, 8)
WAITING = {
    "text alone": (Optional, True, (None, X), {}),
    "image alone": (Optional, True, (X,), {}),
    "labels": (Labels, True, (X,), {"labels": X}),
    "extras": (Extras, True, (X,), {"scale": X}),
    "in training": (InTraining, True, (X,), {}),
    "in evaluation": (InEvaluation, False, (X,), {}),
}


@pytest.mark.parametrize("built_in", [True, False], ids=["built in training", "built in evaluation"])
@pytest.mark.parametrize("build, training, args, kwargs", WAITING.values(), ids=WAITING)
def test_a_net_waits_for_the_call_that_has_chains(build, training, args, kwargs, built_in):
    model = build().train(built_in)
    net = mfx.momentumize(model, gamma=0.0)  # warnings are errors here
    assert net is not model
    assert torch.equal(net.train(training)(*args, **kwargs), model.train(training)(*args, **kwargs))
    (chain,) = mfx.explain(net).chains
    assert len(chain.steps) == 4


@pytest.mark.parametrize("build, training, args, kwargs", WAITING.values(), ids=WAITING)
def test_chains_in_one_kind_of_call_only(build, training, args, kwargs):
    """Calls without the chain come first and last; the function is one."""
    model = build()
    net = mfx.momentumize(model, gamma=0.5)
    other = mfx.momentumize(model, gamma=0.5).train(training)(*args, **kwargs)
    first = () if build is Optional else (X,)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            assert net.train(build is InEvaluation)(*first) is None or build is not Optional
        assert torch.equal(net.train(training)(*args, **kwargs), other)
    assert not torch.equal(other, model.train(training)(*args, **kwargs))


def test_inputs_without_names_that_may_come():
    net = mfx.momentumize(More(), gamma=0.0, capture="dynamo")
    net(X, X)
    assert len(mfx.explain(net).chains) == 1


def test_a_call_without_chains_says_so_once():
    net = mfx.momentumize(Labels(), gamma=0.5)
    with pytest.warns(UserWarning, match="Labels has no chain of residual adds to rewrite and runs as it was written"):
        net(X)
    net(X)


@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Linear(8, 8)), lambda: nn.Sequential(Block(), nn.Tanh())])
def test_where_no_call_can_have_a_chain_the_model_comes_back(build):
    for training in (True, False):
        model = build().train(training)
        with pytest.warns(UserWarning, match="is returned unchanged"):
            assert mfx.momentumize(model) is model
        assert model.training is training


class Scaled(nn.Module):
    """No residual add; Dynamo is needed."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(depth))

    def forward(self, x):
        if x.shape[0] > 100:
            x = x * 2
        for block in self.blocks:
            x = 0.5 * x + block(x)
        return x


def python_calls(function):
    count = 0

    def count_calls(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(count_calls)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.filterwarnings("ignore:mfx. Scaled has no chain")
def test_a_net_without_chains_makes_few_python_calls():
    """At most one for each module that may hold chains, whatever the depth; wall time is too noisy for a test."""
    extra = []
    for depth in (5, 10, 20):
        model = Scaled(depth)
        net = mfx.momentumize(model)
        net(X)
        extra.append(python_calls(lambda: net(X)) - python_calls(lambda: model(X)))  # noqa: B023
    assert extra[1] - extra[0] <= 5
    assert extra[2] - extra[1] == 2 * (extra[1] - extra[0])


@pytest.mark.filterwarnings("ignore:mfx. Scaled has no chain")
def test_a_net_without_chains_notices_what_changes():
    model = Scaled(3)
    net = mfx.momentumize(model, gamma=0.5)
    net(X)
    net.blocks[1] = nn.Sequential(TwoAdds(), TwoAdds())
    net(X)
    assert [chain.name for chain in mfx.explain(net).chains] == ["blocks"]
