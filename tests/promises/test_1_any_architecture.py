"""Any call of any architecture finds the chains of the one network, and never runs another."""

import copy
import functools
import inspect
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from types import MethodType

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import WIDTH, Masked, Stack, inputs

# --- arguments and results --------------------------------------------------------------------------------------------


MASK = torch.arange(WIDTH).remainder(2).float()
CALLS = {
    "plain": ((), {}),
    "keyword mask": ((), {"mask": MASK}),
    "positional mask": ((MASK,), {}),
    "scale": ((None, 0.5), {}),
    "integer scale": ((), {"scale": 2}),
    "boolean scale": ((), {"scale": True}),
    "all": ((MASK, 0.5), {"twice": True}),
}


@pytest.mark.parametrize("args, kwargs", CALLS.values(), ids=CALLS)
def test_arguments(args, kwargs):
    model = Masked()
    net = mfx.momentumize(model, gamma=0.0)
    net(inputs())
    assert torch.equal(net(inputs(), *args, **kwargs), model(inputs(), *args, **kwargs))
    assert torch.equal(net.forward(inputs(), *args, **kwargs), model(inputs(), *args, **kwargs))
    assert torch.equal(net(x=inputs()), model(inputs()))


def test_one_graph_for_each_set_of_other_values():
    net = mfx.momentumize(Masked())
    for args in ((), (None,), (None, 1.0), (MASK,), (2 * MASK,), (None, 2.0), (None, 1)):
        net(inputs(), *args)
    assert list(mfx.graphs(net)) == ["train", "train#2", "train#3", "train#4"]


@pytest.mark.parametrize(
    "args, kwargs",
    [((), {}), ((inputs(),), {"maks": None}), ((inputs(),), {"x": inputs()}), ((inputs(), None, 1.0, True), {})],
    ids=["missing", "unknown", "twice", "too many"],
)
def test_wrong_arguments_are_type_errors(args, kwargs):
    model = Masked()
    net = mfx.momentumize(model)
    for each in (model, net):
        with pytest.raises(TypeError):
            each(*args, **kwargs)


def test_signature():
    model = Masked()
    assert inspect.signature(mfx.momentumize(model).forward) == inspect.signature(model.forward)


class Lists(Stack):
    def forward(self, x, repeats=(1, 1), names=None, more=None):
        for repeat in repeats:
            x = self.embed(x) * repeat
        for block in self.blocks[: (names or {"depth": 3})["depth"]]:
            x = block(x)
        return x if more is None else x + sum(more)


def test_lists_tuples_and_dicts_of_plain_values():
    model = Lists()
    net = mfx.momentumize(model, gamma=0.0)
    for kwargs in ({"repeats": [2, 3]}, {"repeats": (2, 3)}, {"repeats": (2.0, True)}, {"names": {"depth": 2}}):
        assert torch.equal(net(inputs(), **kwargs), model(inputs(), **kwargs))
    repeats = [2]
    net(inputs(), repeats=repeats)
    repeats[0] = 3
    assert torch.equal(net(inputs(), repeats=repeats), model(inputs(), repeats=repeats))


class Batch:
    """A batch as a data loader returns it."""

    def __init__(self) -> None:
        self.x = inputs()


CONTAINERS = {
    "list": [inputs()],
    "dict": {"a": inputs()},
    "tuple": (inputs(), 1),
    "object": Batch(),
    "iterator": iter([1]),
}


@pytest.mark.parametrize("value", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_of_tensors_are_refused(value):
    net = mfx.momentumize(Lists(), capture="symbolic")
    with pytest.raises(mfx.MfxError, match=r"Lists.forward got a .* as more.*give every tensor an argument of its own"):
        net(inputs(), more=value)


class Extras(Stack):
    def forward(self, x, *rest, **options):
        return super().forward(x) * options.get("scale", 1) + options.get("bias", 0)


def test_keyword_extras():
    model = Extras()
    net = mfx.momentumize(model, gamma=0.0)
    for kwargs in ({}, {"scale": 2}, {"bias": torch.ones(3)}, {"bias": torch.ones(3), "scale": 3}):
        assert torch.equal(net(inputs(), **kwargs), model(inputs(), **kwargs))


def test_positional_extras_are_refused():
    net = mfx.momentumize(Extras(), capture="symbolic")
    with pytest.raises(mfx.MfxError, match=r"Extras.forward takes inputs without names \(\*rest\)"):
        net(inputs(), inputs())


class OnlyNameless(Stack):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class PositionalOnly(Stack):
    def forward(self, x, /):
        return super().forward(x)


@pytest.mark.parametrize("build, name", [(OnlyNameless, r"\*args"), (PositionalOnly, "x, /")])
def test_a_forward_without_names_is_refused(build, name):
    for function in (partial(mfx.momentumize, capture="symbolic"), mfx.explain, mfx.trace):
        with pytest.raises(mfx.MfxError, match=rf"takes inputs without names \({name}\).*momentumize the model inside"):
            function(build())


def test_a_forward_replaced_on_the_instance_is_refused():
    model = Stack()
    model.forward = lambda x: x
    message = r"forward of this Stack has been replaced on the instance.*Momentumize the model first"
    for function in (mfx.momentumize, mfx.explain, mfx.trace):
        with pytest.raises(mfx.MfxError, match=message):
            function(model)


def test_a_forward_wrapped_afterwards():
    net = mfx.momentumize(Stack())
    expected, inner = net(inputs()), net.forward

    def doubled(*args, **kwargs):
        return 2 * inner(*args, **kwargs)

    doubled.__wrapped__ = inner
    net.forward = doubled
    assert torch.equal(net(inputs()), 2 * expected)
    assert list(mfx.graphs(net)) == ["train"]
    with mfx.original(net):
        assert not torch.equal(net(inputs()), 2 * expected)


def test_a_forward_made_a_method_afterwards():
    net = mfx.momentumize(Stack())
    expected = net(inputs())
    net.forward = MethodType(net.forward, net)
    assert torch.equal(net(inputs()), expected)
    assert list(mfx.graphs(net)) == ["train"]


class InnerReplaced(Stack):
    """A library put another forward on an inner module, as accelerate does."""

    def __init__(self) -> None:
        super().__init__()
        inner = self.blocks[0].mlp
        inner.forward = type(inner).forward.__get__(inner)


def test_a_forward_replaced_on_an_inner_module():
    model = InnerReplaced()
    net = mfx.momentumize(model, gamma=0.0)
    assert torch.equal(net(inputs()), model(inputs()))


def test_lazy_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(8), Stack())
    net = mfx.momentumize(model)
    net(inputs()).sum().backward()
    assert type(net[0]) is nn.Linear
    assert net[0].weight is model[0].weight
    model(inputs())


def test_no_batch_and_empty_batch():
    net = mfx.momentumize(Stack())
    assert net(inputs()[0]).shape == (3,)
    assert net(inputs(batch=0)).shape == (0, 3)


@dataclass
class Result(OrderedDict):
    """An output as Hugging Face models return it: a mapping of the fields that are there."""

    end: torch.Tensor | None = None
    start: torch.Tensor | None = None

    def __post_init__(self):
        self.update({name: value for name, value in vars(self).items() if value is not None})


class Own(dict):
    pass


class Returns(Stack):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(end=super().forward(x))


@pytest.mark.parametrize("how", [dict, OrderedDict, Result, Own])
def test_the_class_of_what_a_model_returns(how):
    model = Returns(how)
    expected, actual = model(inputs()), mfx.momentumize(model, gamma=0.0)(inputs())
    assert type(actual) is type(expected) is how
    assert list(actual) == ["end"]
    assert torch.equal(actual["end"], expected["end"])


def test_a_mapping_that_a_trace_cannot_make_is_refused():
    with pytest.raises(mfx.MfxError, match="a Own would become a dict"):
        mfx.momentumize(Returns(Own), capture="symbolic")


# --- branches that write into a cache: without gradients, none of them runs again -------------------------------------


class Model(nn.Module):
    """Each block keeps a running mean of what it saw in a tensor of the caller's, its own one or one for all."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.shared = shared

    def forward(self, x, caches):
        for i, layer in enumerate(self.layers):
            cache = caches[0 if self.shared else i]
            cache.copy_(0.9 * cache + 0.1 * x)
            x = x + torch.tanh(layer(x + cache))
        return x


def call(net):
    torch.manual_seed(1)
    x, caches = torch.randn(2, 4), [torch.randn(2, 4) for _ in range(3)]
    return [net(x, caches), *caches]


def recurrence(model, gamma):
    """The momentum network, written out."""
    torch.manual_seed(1)
    x, caches = torch.randn(2, 4), [torch.randn(2, 4) for _ in range(3)]
    v = torch.zeros_like(x)
    for cache, layer in zip(caches, model.layers, strict=True):
        cache.copy_(0.9 * cache + 0.1 * x)
        v = gamma * v + (1 - gamma) * torch.tanh(layer(x + cache))
        x = x + v
    return [x, *caches]


def lengths(net):
    return [len(chain.steps) for chain in mfx.explain(net).chains]


@pytest.mark.parametrize("shared", [False, True])
def test_without_gradients_a_step_may_write_into_what_it_alone_reads(shared):
    model = Model(shared=shared)
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")
    with torch.no_grad():
        if shared:
            with pytest.warns(UserWarning, match="no chain"):
                found = call(net)
        else:
            found = call(net)
        for _ in range(2):
            assert all(map(torch.equal, found, call(model)))
            found = call(copy.deepcopy(net))
    assert lengths(net) == ([] if shared else [3])


def test_with_momentum():
    model = Model()
    with torch.no_grad():
        found, expected = call(mfx.momentumize(model, gamma=0.5, capture="dynamo")), recurrence(model, 0.5)
    for a, b in zip(found, expected, strict=True):  # states of 40 fraction bits or float32, three steps
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_with_gradients_it_would_write_twice():
    net = mfx.momentumize(Model(), gamma=0.0, capture="dynamo")
    with pytest.warns(UserWarning, match="no chain"):
        call(net)
    assert {r.reason.split(" ", 1)[1] for r in mfx.explain(net).rejections} == {
        "changes in place a value that the branch is given from outside"
    }


def test_the_networks_with_and_without_gradients_must_be_one():
    net = mfx.momentumize(Model(), gamma=0.5, capture="dynamo")
    with torch.no_grad():
        call(net)
    with pytest.raises(mfx.MfxError, match="other chains in one call than in another"):
        call(net)


# --- pieces of the stream --------------------------------------------------------------------------------------------


class Single(nn.Module):
    """Text and image are put together for every block and split again, as in the single-stream blocks of Flux."""

    def __init__(self):
        super().__init__()
        self.blocks = Stack(depth=3, dropout=0.25).blocks
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, text, image):
        seen = []
        for block in self.blocks:
            n = text.shape[1]
            x = block(torch.cat([text, image], dim=1))
            text, image = x[:, :n], x[:, n:]
            seen.append(self.head(image))
        return image, seen


def texts_and_images(sizes):
    torch.manual_seed(0)
    return [torch.randn(2, size, WIDTH, requires_grad=True) for size in sizes]


def gradients(net, sizes):
    given = texts_and_images(sizes)
    torch.manual_seed(1)
    image, seen = net(*given)
    (image.square().sum() + sum(each.sum() for each in seen)).backward()
    found = [tensor.grad for tensor in (*given, *net.parameters())]
    net.zero_grad()
    return [image, *seen, *found]


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_a_stream_that_is_split_and_put_together_is_one_chain(capture):
    model = Single()
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    kept = mfx.momentumize(model, gamma=0.9, capture=capture, memory_budget=1.0)
    for sizes in ((3, 5), (2, 7)):
        expected = gradients(model, sizes)
        assert all(map(torch.equal, gradients(net, sizes), expected))
    assert lengths(net) == [6]
    mfx.set_gamma(net, 0.9)
    for sizes in ((3, 5), (2, 7)):
        assert all(map(torch.equal, gradients(net, sizes), gradients(kept, sizes)))


# --- scaled and gated skips -------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Blocks of a plain step, a scaled one and a highway, with dropout."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("f", "g", "h", "gate")}) for _ in range(3)
        )
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.drop = nn.Dropout(0.25)

    def maps(self):
        for block in self.blocks:
            yield lambda x, block=block: x + self.drop(block["f"](x))
            yield lambda x, block=block: self.scale * x + self.drop(block["g"](x))
            yield lambda x, block=block: torch.lerp(x, block["h"](x).relu(), block["gate"](x).sigmoid())

    def forward(self, x):
        for step in self.maps():
            x = step(x)
        return x


def value_and_gradients(net):
    x = inputs().requires_grad_()
    torch.manual_seed(1)
    out = net(x)
    out.square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in net.parameters())]
    net.zero_grad()
    return [out, *found]


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_scaled_and_gated_skips_are_steps_among_plain_ones(capture):
    model = Gated()
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    assert all(map(torch.equal, value_and_gradients(net), value_and_gradients(model)))
    assert lengths(net) == [9]
    kept = mfx.momentumize(model, gamma=0.9, capture=capture, memory_budget=1.0)
    mfx.set_gamma(net, 0.9)
    assert all(map(torch.equal, value_and_gradients(net), value_and_gradients(kept)))


def test_they_are_the_plain_recurrence():
    model = Gated().double().eval()
    net, x = mfx.momentumize(model, gamma=0.9), inputs().double()
    expected, v = x, torch.zeros_like(x)
    for step in model.maps():
        v = 0.9 * v + 0.1 * (step(expected) - expected)
        expected = expected + v
    torch.testing.assert_close(net(x), expected, rtol=0, atol=9 * 10 * 2**-40)  # X and v are rounded to 2**-40


class Unrolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.new = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        state = x
        for _ in range(4):
            z = self.gate(state).sigmoid()
            state = z * state + (1 - z) * (self.new(state) + x).tanh()
        return state


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_a_gated_unit_that_runs_over_time_is_no_chain(capture):
    def run(model):
        return mfx.momentumize(model, capture=capture)(inputs())

    model = Unrolled()
    with pytest.warns(UserWarning, match="chain"):
        out = run(model)
    assert torch.equal(out, model(inputs()))


def _by_position(forward):
    @functools.wraps(forward)
    def passed_on(*args):
        return forward(*args)

    return passed_on


@pytest.mark.parametrize("capture", ["auto", pytest.param("dynamo", marks=pytest.mark.zoo)])
def test_a_decorator_may_pass_on_positions_alone(capture):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        @_by_position
        def forward(self, x, scale=1.0):
            return self.blocks(x * scale)

    model, x = Model(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    for args in ((x,), (x, 2.0), (x,)):
        assert torch.equal(net(*args), model(*args))
