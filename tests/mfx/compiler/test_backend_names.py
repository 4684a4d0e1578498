"""Names of chains in compiled code, however a model is written or held; and graphs that are but a part of a model."""

# ruff: noqa: N805 - the name of the first argument is the subject

from functools import partial

import pytest
import torch
from torch import nn

import mfx
from mfx.compiler.backend import momentum
from mfx.compiler.compiled_graphs import graphs_of

pytestmark = [pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(s):
        super().__init__()
        s.f = nn.Linear(8, 8)

    def forward(s, x):
        return x + s.f(x)


def blocks(depth=3):
    return nn.ModuleList(Block() for _ in range(depth))


class Nested(nn.Module):
    """A chain inside the branch of a chain; with ``this`` for ``self``."""

    def __init__(this):
        super().__init__()
        this.down, this.deep, this.up, this.between = blocks(), blocks(), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(this, x):
        for block in this.down:
            x = block(x)
        y = this.between(x)
        for block in this.deep:
            y = block(y)
        return x + this.up(y)


class Trainer:
    """Not a module."""

    def __init__(me, model):
        me.model, me.models, me.by_name = model, [model], {"a": model}

    def of_attribute(me, x):
        return me.model(x)

    def of_list(me, x):
        return me.models[0](x)

    def of_dict(me, x):
        return me.by_name["a"](x)


def through_local(model, x):
    inner = model
    return inner(x)


GLOBAL = Nested()
WAYS = {
    "the model": lambda model: model,
    "its forward": lambda model: model.forward,
    "closure": lambda model: lambda x: model(x),
    "default": lambda model: lambda x, net=model: net(x),
    "partial": lambda model: partial(through_local, model),
    "attribute": lambda model: Trainer(model).of_attribute,
    "list": lambda model: Trainer(model).of_list,
    "dict": lambda model: Trainer(model).of_dict,
}


def compiled(function, *, fullgraph=True, **options):
    return torch.compile(function, backend=momentum, fullgraph=fullgraph, options={"inner": "eager", **options})


def chains(model):
    return [graph.rewritten.chain_lengths for graph in graphs_of(model)]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_names_are_those_of_momentumize(way):
    model, x = Nested(), torch.randn(4, 8)
    net = mfx.momentumize(model, gamma={"root": 0.9, "deep": 0.5})
    function = compiled(way(model), gamma={"root": 0.9, "deep": 0.5})
    assert torch.equal(function(x), net(x))
    (found,) = chains(model)
    assert found.keys() == {"root", "deep"}


def test_names_of_a_global_model():
    compiled(lambda x: GLOBAL(x), skip="deep")(torch.randn(4, 8))
    assert [found.keys() for found in chains(GLOBAL)] == [{"root"}]


def test_two_models_keep_their_names():
    one, two = Nested(), Nested()
    x = torch.randn(4, 8)
    out = compiled(lambda x: (one(x), two(x)), skip=["one.deep", "two.deep"])(x)
    for found, model in zip(out, (one, two), strict=True):
        assert torch.equal(found, mfx.momentumize(model, skip="deep")(x))


class Outer(nn.Module):
    """Has a submodule of the name of a global model that it also runs: two tensors of one path."""

    def __init__(this):
        super().__init__()
        this.GLOBAL = Nested()

    def forward(this, x):
        return this.GLOBAL(x) * 1.0, GLOBAL(x)


def test_a_global_model_of_the_name_of_a_submodule():
    model, x = Outer(), torch.randn(4, 8)
    found = compiled(model)(x)
    assert torch.equal(found[0], mfx.momentumize(model.GLOBAL)(x))
    expected = mfx.momentumize(GLOBAL)(x)
    assert torch.equal(found[1], expected)


class Broken(nn.Module):
    """A graph break cuts the chain."""

    def __init__(s, where="within"):
        super().__init__()
        s.first, s.second, s.mid, s.where = blocks(), blocks(), nn.Linear(8, 8), where

    def forward(s, x):
        for block in s.first:
            x = block(x)
        if s.where == "between":
            x = s.mid(x)
        torch._dynamo.graph_break()
        if s.where == "between":
            x = s.mid(x)
        for block in s.second:
            x = block(x)
        return x


@pytest.mark.filterwarnings("ignore:mfx. GraphModule has no chain")  # of the part where all is left out
@pytest.mark.parametrize("where", ["within", "between"])
@pytest.mark.parametrize("options", [{}, {"skip": "second"}, {"only": ["first", "second"]}], ids=str)
def test_at_gamma_zero_a_graph_break_is_no_error(options, where):
    model, x = Broken(where), torch.randn(4, 8)
    expected = torch.autograd.grad(model(x).sum(), [*model.parameters()], allow_unused=True)
    function = compiled(model, fullgraph=False, gamma=0.0, **options)
    found = torch.autograd.grad(function(x).sum(), [*model.parameters()], allow_unused=True)
    assert [a is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * len(expected)
    assert [*map(dict.keys, chains(model))] == [{"first"}, set() if "skip" in options else {"second"}]


@pytest.mark.parametrize("gamma", [{"first": 0.5, "second": 0.0}, {"first": 0.0, "second": 0.9}], ids=str)
def test_at_other_gammas_a_chain_must_not_be_cut(gamma):
    name = next(name for name, value in gamma.items() if value)
    with pytest.raises(Exception, match=f"chain {name} is cut by a graph break"):
        compiled(Broken(), fullgraph=False, gamma=gamma)(torch.randn(4, 8))


def test_gamma_by_name_for_the_pieces_of_a_model():
    model, x = Broken("between"), torch.randn(4, 8)
    gamma = {"first": 0.5, "second": 0.9}
    whole = Broken("between")
    whole.load_state_dict(model.state_dict())
    first = mfx.momentumize(nn.Sequential(*model.first), gamma=0.5)
    second = mfx.momentumize(nn.Sequential(*model.second), gamma=0.9)
    expected = second(model.mid(model.mid(first(x))))
    assert torch.equal(compiled(model, fullgraph=False, gamma=gamma)(x), expected)


def test_at_gamma_zero_the_recompile_limit_is_no_error():
    class Scaled(Nested):
        def forward(this, x, how):
            return super().forward(x) * len(how)

    model = Scaled()
    function, x = compiled(model, fullgraph=False, gamma=0.0), torch.randn(2, 8)
    for number in range(1, torch._dynamo.config.recompile_limit + 2):
        assert torch.equal(function(x, "x" * number), model(x, "x" * number))
