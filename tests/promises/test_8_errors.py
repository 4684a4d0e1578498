"""Every error is an MfxError that says what, where and what to do."""

import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import Stack, inputs

# --- options, arguments and models ------------------------------------------------------------------------------------


OPTIONS = [
    ({"gamma": 1.0}, r"gamma must be a real number with 0 <= gamma < 1, not 1\.0"),
    ({"gamma": -0.1}, "gamma must be"),
    ({"gamma": float("nan")}, "gamma must be .* not nan"),
    ({"gamma": float("inf")}, "gamma must be"),
    ({"gamma": "0.9"}, "gamma must be .* not '0.9'"),
    ({"gamma": True}, "gamma must be .* not True"),
    ({"gamma": None}, "gamma must be"),
    ({"gamma": torch.tensor(0.9)}, "gamma must be"),
    ({"gamma": 1e-9}, "cannot be told from 0"),
    ({"gamma": {"blocks": 1.5}}, "gamma must be"),
    ({"gamma": {}}, "gamma={}: a mapping goes from chain names"),
    ({"gamma": {0: 0.5}}, "a mapping goes from chain names"),
    ({"velocity": "one"}, "velocity='one': .* 'zero', 'residual' .* a module .* or a mapping"),
    ({"velocity": None}, "velocity=None: "),
    ({"velocity": torch.zeros(2)}, "velocity=tensor"),
    ({"velocity": nn.Linear}, "velocity=<class"),
    ({"velocity": {"blocks": "zero"}}, "velocity={'blocks': 'zero'}: "),
    ({"velocity": {1: nn.Identity()}}, "velocity={1: "),
    ({"arithmetic": "int"}, "arithmetic='int': must be 'exact' or 'float'"),
    ({"arithmetic": np.zeros(2)}, "arithmetic=array"),
    ({"memory_budget": -0.1}, r"memory_budget=-0\.1: must be a share from 0\.0 .* or a number of bytes"),
    ({"memory_budget": 1.5}, r"memory_budget=1\.5: must be"),
    ({"memory_budget": float("nan")}, "memory_budget=nan: must be"),
    ({"memory_budget": float("inf")}, "memory_budget=inf: must be"),
    ({"memory_budget": "12 parsecs"}, "memory_budget='12 parsecs': must be"),
    ({"memory_budget": "GiB"}, "memory_budget='GiB': must be"),
    ({"memory_budget": None}, "memory_budget=None: must be"),
    ({"memory_budget": False}, "memory_budget=False"),
    ({"memory_budget": torch.zeros(2)}, "memory_budget=tensor"),
    ({"recompute": "none"}, "recompute='none': must be None .* or 'all'"),
    ({"recompute": True}, "recompute=True: must be None"),
    ({"min_steps": 0}, "min_steps=0: .* an integer of at least 1"),
    ({"min_steps": 2.0}, r"min_steps=2\.0"),
    ({"min_steps": True}, "min_steps=True"),
    ({"only": 3}, "only=3: must be a chain name or module path, or several"),
    ({"only": ["blocks", None]}, "only="),
    ({"only": []}, "only is empty, so nothing would be rewritten"),
    ({"only": "layer*"}, r"'layer\*' in only/skip fits no chain and no module path of a step. Chains: blocks"),
    ({"skip": 3}, "skip=3: must be"),
    ({"skip": ["blocks.0", "x"]}, "'x' in only/skip fits no chain"),
    ({"capture": "jit"}, "capture='jit': must be"),
    ({"verify": "maybe"}, "verify='maybe': must be 'warn' or 'raise' or 'off'"),
]


@pytest.mark.parametrize("options, message", OPTIONS, ids=[repr(options) for options, _ in OPTIONS])
def test_options(options, message):
    with pytest.raises(mfx.MfxError, match=message):
        mfx.momentumize(Stack(), **options)


def test_an_unknown_option():
    with pytest.raises(TypeError, match="gama"):
        mfx.momentumize(Stack(), gama=0.9)


def test_options_that_leave_nothing_out():
    net = mfx.momentumize(Stack(), skip=[], only=["blocks"], memory_budget=1, gamma=np.float64(0.5))
    assert mfx.explain(net).chains[0].gamma == 0.5


@pytest.mark.parametrize("function", [mfx.momentumize, mfx.trace])
@pytest.mark.parametrize(
    "wrong, name",
    [(Stack, "the class Stack"), (lambda x: x, "a function"), (None, "a NoneType"), ([Stack()], "a list")],
)
def test_not_a_module(function, wrong, name):
    with pytest.raises(mfx.MfxError, match=rf"takes a torch.nn.Module, not {name}\."):
        function(wrong)


@pytest.mark.parametrize("wrong, name", [(Stack, "the class Stack"), (7, "an int"), (None, "a NoneType")])
def test_not_a_net(wrong, name):
    with pytest.raises(mfx.MfxError, match=rf"graphs takes a momentumized net, not {name}\."):
        mfx.graphs(wrong)
    with pytest.raises(mfx.MfxError, match=rf"original takes a momentumized net, not {name}\."), mfx.original(wrong):
        pass


class BySize(Stack):
    """Symbolic tracing cannot follow it, so TorchDynamo captures it."""

    def forward(self, x):
        return super().forward(x if len(x) > 1 else 2 * x)


def test_a_call_with_other_arguments_than_forward_takes():
    """A TypeError, as for any function, that names the function."""
    net, captured_by_dynamo = mfx.momentumize(Stack()), mfx.momentumize(BySize())
    captured_by_dynamo(inputs())
    for call in (net, partial(mfx.explain, Stack()), partial(mfx.profile, net)):
        with pytest.raises(TypeError, match=r"Stack.forward: missing a required argument: 'x'; it takes \(x\)"):
            call(y=inputs())
        with pytest.raises(TypeError, match=r"Stack.forward: too many positional arguments; it takes \(x\)"):
            call(inputs(), inputs())
    with pytest.raises(TypeError, match=r"BySize.forward: missing a required argument: 'x'; it takes \(x\)"):
        captured_by_dynamo(y=inputs())


@pytest.mark.parametrize(
    "wrap, message",
    [
        (torch.compile, r"forward of this OptimizedModule has been replaced.*Momentumize the model first"),
        (nn.DataParallel, r"DataParallel wraps a model; momentumize the model inside"),
        (lambda model: torch.jit.ScriptModule(), "a ScriptModule has no Python code.*before it is scripted"),
    ],
    ids=["compiled", "parallel", "scripted"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_wrapped_models(wrap, message):
    for function in (mfx.momentumize, mfx.trace):
        with pytest.raises(mfx.MfxError, match=message):
            function(wrap(Stack()))
    not_called = "no graph of this compiled Stack is known.*Call it once; or explain the model itself"
    with pytest.raises(mfx.MfxError, match=not_called if "OptimizedModule" in message else message):
        mfx.explain(wrap(Stack()))


# --- models that cannot be traced ------------------------------------------------------------------------------------


class Branching(Stack):
    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class LayerDrop(Stack):
    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x):
        for block in self.blocks:
            if not self.training or self.draw() > 0.1:
                x = block(x)
        return self.head(x)


class Reading(Stack):
    def forward(self, x):
        return super().forward(x) * float(self.unused.sum())


class Counting(Stack):
    def forward(self, x):
        return super().forward(x)[: int(self.unused.sum())]


class Broken(Stack):
    def forward(self, x):
        return super().forward(x).no_such_thing.nor_this(y)  # noqa: F821


def line_of(model: type, offset: int) -> str:
    return rf"{re.escape(__file__)}:{model.forward.__code__.co_firstlineno + offset}"


symbolically = partial(mfx.momentumize, capture="symbolic")
FUNCTIONS = [symbolically, mfx.explain, mfx.trace]


@pytest.mark.parametrize("function", [symbolically, mfx.explain])  # mfx.trace takes one path, which its graph checks
def test_a_decision_about_data(function):
    message = rf"Branching cannot be traced.*control flow.*{line_of(Branching, 1)}.*Rewrite that line"
    with pytest.raises(mfx.MfxError, match=message):
        function(Branching())


DRAWS = {"random": lambda: random.random(), "numpy.random": lambda: np.random.rand()}  # noqa: NPY002


@pytest.mark.parametrize("name", DRAWS)
def test_a_decision_by_chance(name):
    model = LayerDrop(DRAWS[name])
    states = random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    with pytest.raises(mfx.MfxError, match=rf"LayerDrop draws random numbers \({name}\).*Rewrite that line"):
        symbolically(model)
    assert (random.getstate(), np.random.get_state()[2]) == states  # noqa: NPY002
    mfx.momentumize(model.eval())(inputs())


def test_a_decision_by_chance_in_one_mode_is_found_at_the_call():
    net = mfx.momentumize(LayerDrop(random.random).eval())
    net(inputs())
    net.train()
    with pytest.raises(mfx.MfxError, match="random numbers"):
        net(inputs())
    net.eval()(inputs())


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("build", [Reading, Counting])
def test_the_value_of_a_tensor(function, build):
    with pytest.raises(mfx.MfxError, match=rf"{build.__name__} .*{line_of(build, 1)}.*Rewrite that line"):
        function(build())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_error_in_forward(function):
    with pytest.raises(mfx.MfxError, match=rf"Broken cannot be traced.*NameError.*{line_of(Broken, 1)}"):
        function(Broken())


def test_after_an_error_the_model_is_as_it_was():
    model = Branching()
    before = dict(model.__dict__)
    with pytest.raises(mfx.MfxError):
        symbolically(model)
    assert model.__dict__ == before
    model(inputs())


# --- models without chains -------------------------------------------------------------------------------------------

WITHOUT = {
    "no adds": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
    "one add": lambda: Stack(depth=1).blocks[0].mlp,
}


@pytest.mark.parametrize("build", WITHOUT.values(), ids=WITHOUT)
def test_a_model_without_chains_comes_back(build):
    model = build()
    name = type(model).__name__
    message = rf"{name} has no chain of residual adds .*returned unchanged. Looked for: .*mfx.explain\(model\) lists"
    with pytest.warns(UserWarning, match=message) as caught:
        assert mfx.momentumize(model) is model
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "forward" not in model.__dict__


def test_everything_left_out():
    model = Stack()
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        assert mfx.momentumize(model, min_steps=7) is model
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        assert mfx.momentumize(model, skip="*") is model


# --- nested tensors ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.linear(self.norm(x))
        return x + self.linear(self.norm(x))


class OfSequences(nn.Module):
    """Makes a nested tensor of sequences, whose lengths are values and in no graph; then goes on with plain ones."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), Block()

    def forward(self, x, lengths):
        nested = torch.nested.nested_tensor([row[:length] for row, length in zip(x, lengths.tolist(), strict=True)])
        return self.head(torch.stack([row.mean(0) for row in self.block(nested).unbind()]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_inside_of_a_model():
    torch.manual_seed(0)
    model, x, lengths = OfSequences(), torch.randn(2, 5, 4), torch.tensor([3, 5])
    net = mfx.momentumize(model, gamma=0.0)
    with pytest.warns(UserWarning, match=r"these chains were found: head\b"):
        out = net(x, lengths)
    assert torch.equal(out, model(x, lengths))
    out.sum().backward()
    assert [chain.name for chain in mfx.explain(net).chains] == ["head"]


class Packed(nn.Module):
    """Makes a nested tensor that a graph of Dynamo's could hold, and goes through its chain with it."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)).values()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_inside_of_a_graph():
    torch.manual_seed(0)
    model, x = Packed(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="Packed cannot be captured as one graph"):
        out = mfx.momentumize(model)(x)
    assert torch.equal(out, model(x)), "no state has rows of several sizes"
    with pytest.raises(mfx.MfxError, match="Packed cannot be captured as one graph"):
        mfx.momentumize(model, capture="dynamo")(x)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_given_to_a_net(layout):
    net = mfx.momentumize(Block())
    with pytest.raises(mfx.MfxError, match=r"Block is given a nested tensor.* Give it a padded tensor and a mask"):
        net(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=layout))
    assert net(torch.randn(1, 3, 4)).shape == (1, 3, 4)
