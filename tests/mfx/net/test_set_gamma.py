"""γ set anew on a net that exists: the numbers, the gradients, and everything that has to follow."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from torch import nn

import mfx
from tests.mfx.models import WIDTH, Masked, Stack, counting, inputs, recurrence, stack_recurrence
from tests.oracles import assert_close_grads, grads, momentum_reference
from tests.sampling import grid

# Exact arithmetic is within n·2⁻⁴⁰·T^1.5 of the recurrence at γ = n/d: n ≤ 99 and T ≤ 24 here, which makes 1.1e-8 for
# values of about 1. In float arithmetic on float64, rebuilt states are within 1e-10. Gradients get ten times as much.
TOLERANCE = {"rtol": 1.1e-8, "atol": 1.1e-8}
GRADIENTS = 1.1e-7
GAMMAS = (0.5, 0.0, 0.9, 1 / 64, 0.0, 0.99)


def chain_of(model, x, gamma, velocity="zero"):
    """A Stack in float64 by the plain recurrence, velocity and all."""
    functions = []
    for block in model.blocks:
        functions.append(lambda x, b=block: b.mix(b.norm1(x)))
        functions.append(lambda x, b=block: b.mlp(b.norm2(x)))
    return model.head(momentum_reference(functions, model.embed(x), gamma, velocity=velocity).output)


def step(function, model, *args):
    model.zero_grad()
    out = function(*args)
    out.square().sum().backward()
    return out.detach(), grads(model)


@pytest.mark.parametrize("memory_budget", [0.0, 1.0])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("velocity", ["zero", "residual", "module"])
def test_outputs_and_gradients_follow(velocity, arithmetic, memory_budget):
    torch.manual_seed(0)
    model, x = Stack(depth=12).double(), inputs(dtype=torch.float64)
    start = nn.Linear(WIDTH, WIDTH).double() if velocity == "module" else velocity
    net = mfx.momentumize(model, velocity=start, arithmetic=arithmetic, memory_budget=memory_budget)
    for gamma in GAMMAS:
        mfx.set_gamma(net, gamma)
        out, got = step(net, net, x)
        if isinstance(start, nn.Module):
            start.zero_grad()
        expected, wanted = step(lambda x, g=gamma: chain_of(model, x, g, start), model, x)
        torch.testing.assert_close(out, expected, **TOLERANCE)
        assert_close_grads({name: got[name] for name in wanted}, wanted, GRADIENTS)
        with torch.no_grad():
            torch.testing.assert_close(net(x), expected, **TOLERANCE)


@pytest.mark.parametrize("gamma", [0.3, 0.0])
def test_after_any_history_the_net_is_the_one_made_at_that_gamma(gamma):
    torch.manual_seed(0)
    model, x = Stack(depth=8), inputs()
    net, fresh = mfx.momentumize(model, gamma=0.9), mfx.momentumize(model, gamma=gamma)
    for value in (0.0, 0.7, gamma):
        mfx.set_gamma(net, value)
        step(net, net, x)
    out, got = step(net, net, x)
    expected, wanted = step(fresh, fresh, x)
    assert torch.equal(out, expected)
    assert_close_grads(got, wanted, 0.0)


def test_at_zero_it_is_the_original_model_bit_for_bit():
    torch.manual_seed(0)
    model, x = Stack(depth=8), inputs()
    net = mfx.momentumize(model)
    mfx.set_gamma(net, 0)
    (out, got), (expected, wanted) = step(net, net, x), step(model, model, x)
    assert torch.equal(out, expected)
    assert_close_grads(got, wanted, 0.0)


@pytest.mark.parametrize("before, after", [*pairwise(GAMMAS), (0.9, 0.5)])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_call_keeps_its_gamma_until_its_backward_pass_is_done(before, after, arithmetic):
    torch.manual_seed(0)
    model, x = Stack(depth=12).double(), inputs(dtype=torch.float64)
    net = mfx.momentumize(model, gamma=before, arithmetic=arithmetic, verify="raise")
    loss = net(x).square().sum()
    mfx.set_gamma(net, after)
    later = net(x).square().sum()
    net.zero_grad()
    loss.backward()
    got = grads(net)
    _, wanted = step(lambda x: chain_of(model, x, before), model, x)
    assert_close_grads(got, wanted, GRADIENTS)
    net.zero_grad()
    later.backward()
    got = grads(net)
    _, wanted = step(lambda x: chain_of(model, x, after), model, x)
    assert_close_grads(got, wanted, GRADIENTS)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(10))

    def forward(self, x):
        h = torch.tanh(x)
        for fc in self.fcs:
            h = h + fc(h)
        return h.sin()


class Nested(nn.Module):
    """Chains inside the steps of a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Inner() for _ in range(10))

    def forward(self, x):
        for inner in self.inner:
            x = x + inner(x)
        return x


def nested_recurrence(model, x, outer, inner):
    branches = [lambda x, m=m: recurrence(torch.tanh(x), m.fcs, inner).sin() for m in model.inner]
    return recurrence(x, branches, outer)


@grid(
    4,
    new=[0.2, {"inner": 0.2}, {"inner.*": 0.2}, {"inner.*": 0.0}],
    build={"module": lambda net: net, "graph module": mfx.trace},
)
def test_a_chain_inside_a_chain_keeps_its_gamma_too(new, build):
    torch.manual_seed(0)
    model, x = Nested().double(), inputs(dtype=torch.float64)
    net = mfx.momentumize(build(model), gamma=0.9, verify="raise")
    out = net(x)
    mfx.set_gamma(net, new)
    net.zero_grad()
    out.square().sum().backward()
    got = grads(net)
    expected, wanted = step(lambda x: nested_recurrence(model, x, 0.9, 0.9), model, x)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert_close_grads(got, wanted, GRADIENTS)
    outer = new if not isinstance(new, dict) else new.get("inner", 0.9)
    inner = new if not isinstance(new, dict) else new.get("inner.*", 0.9)
    torch.testing.assert_close(net(x), nested_recurrence(model, x, outer, inner), **TOLERANCE)


# --- real models -----------------------------------------------------------------------------------------------------


def resnet_by_hand(model, x, gamma):
    """torchvision's resnet18 with momentum in each stage's steps: h(x) = relu(x + f(x)), f taken as h(x) − x."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        first = 0 if stage[0].downsample is None else 1
        for block in stage[:first]:
            x = block(x)
        rest = list(stage[first:])
        x = momentum_reference(rest, x, gamma, kind="map").output if len(rest) > 1 else rest[0](x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def test_a_resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    net = mfx.momentumize(model)
    chains = {chain.name: len(chain.steps) for chain in mfx.explain(net).chains}
    assert chains == {"layer1": 2}
    for gamma in (0.5, 0.0, 0.9):
        mfx.set_gamma(net, gamma)
        out, got = step(net, net, x)
        expected, wanted = step(lambda x, g=gamma: resnet_by_hand(model, x, g), model, x)
        torch.testing.assert_close(out, expected, **TOLERANCE)
        assert_close_grads(got, wanted, GRADIENTS)


def vit_by_hand(model, x, gamma):
    functions = []
    for block in model.blocks:
        functions.append(lambda x, b=block: b.attn(b.norm1(x)))
        functions.append(lambda x, b=block: b.mlp(b.norm2(x)))
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    return model.forward_head(model.norm(momentum_reference(functions, x, gamma).output))


def test_a_vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    net = mfx.momentumize(model, gamma=0.9, verify="raise")
    for gamma in (1 / 64, 0.0, 0.5):
        mfx.set_gamma(net, gamma)
        out, got = step(net, net, x)
        expected, wanted = step(lambda x, g=gamma: vit_by_hand(model, x, g), model, x)
        torch.testing.assert_close(out, expected, **TOLERANCE)
        assert_close_grads(got, wanted, GRADIENTS)


# --- what follows ----------------------------------------------------------------------------------------------------


def gammas(net):
    return {chain.name: chain.gamma for chain in mfx.explain(net).chains}


def test_nothing_is_captured_anew():
    net, x = mfx.momentumize(Stack(depth=8)), inputs()
    net(x)
    graph, captured = net.graph, mfx.graphs(net)
    with counting(net.blocks[0].mlp) as calls:
        for gamma in GAMMAS:
            mfx.set_gamma(net, gamma)
            net(x)
    assert len(calls) == len(GAMMAS)  # no run beside the calls themselves
    assert net.graph is graph
    assert mfx.graphs(net).keys() == captured.keys()


def test_every_graph_follows_also_those_captured_later():
    torch.manual_seed(0)
    model, x = Masked().double(), inputs(dtype=torch.float64)
    net = mfx.momentumize(model, gamma=0.9)
    net(x)
    net.eval()(x)
    mfx.set_gamma(net, 0.25)
    expected = recurrence(x, model.fcs, 0.25)
    mask = torch.full_like(x, 2.0)
    masked = recurrence(x, [lambda x, fc=fc: fc(x) * mask for fc in model.fcs], 0.25)
    for training in (False, True):
        net.train(training)
        torch.testing.assert_close(net(x), expected, **TOLERANCE)
        torch.testing.assert_close(net(x, mask), masked, **TOLERANCE)  # a graph of its own, not captured before
        torch.testing.assert_close(net(x, twice=True), 2 * expected, **TOLERANCE)
    assert len(mfx.graphs(net)) == 6


class AsDeepAsAsked(nn.Module):
    """A chain of as many steps as a call asks for."""

    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))

    def forward(self, x, depth):
        for fc in self.fcs[:depth]:
            x = x + fc(x)
        return x


@pytest.mark.parametrize("first, gamma", [(12, 0.9), (11, 0.0)])  # "auto" is 0.9 from 12 updates on
@pytest.mark.parametrize("given", ["auto", {"fcs": "auto"}, {"*": "auto"}])
def test_auto_is_what_the_first_graph_decided(given, first, gamma):
    torch.manual_seed(0)
    model, x = AsDeepAsAsked().double(), inputs(dtype=torch.float64)
    net = mfx.momentumize(model, gamma="auto")
    for _ in range(2):
        for depth in (first, 23 - first, 5):
            torch.testing.assert_close(net(x, depth), recurrence(x, model.fcs[:depth], gamma), **TOLERANCE)
        mfx.set_gamma(net, given)


def saved_and_loaded(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved_and_loaded])
def test_copies_keep_their_gamma(copied):
    torch.manual_seed(0)
    net, x = mfx.momentumize(Stack().double(), gamma=0.9), inputs(dtype=torch.float64)
    mfx.set_gamma(net, 0.25)
    other = copied(net)
    mfx.set_gamma(net, 0.0)
    assert (gammas(other), gammas(net)) == ({"blocks": 0.25}, {"blocks": 0.0})
    torch.testing.assert_close(other(x), stack_recurrence(other, x, 0.25), **TOLERANCE)
    torch.testing.assert_close(other.eval()(x), stack_recurrence(other, x, 0.25), **TOLERANCE)
    mfx.set_gamma(other, 0.5)
    torch.testing.assert_close(other.train()(x), stack_recurrence(other, x, 0.5), **TOLERANCE)
    torch.testing.assert_close(net(x), stack_recurrence(net, x, 0.0), **TOLERANCE)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (Inner() for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_by_chain_name():
    net = mfx.momentumize(Stages(), gamma={"a.fcs": 0.1, "*": 0.9})
    for given, expected in (
        ({"b*": 0.5}, (0.1, 0.5, 0.9)),
        ({"c.fcs": 0.25, "*": 0.75}, (0.75, 0.75, 0.25)),
        ({"a.fcs": 0.0}, (0.0, 0.75, 0.25)),
        (0.3, (0.3, 0.3, 0.3)),
        ({"[ab].*": 0.6}, (0.6, 0.6, 0.3)),
    ):
        mfx.set_gamma(net, given)
        for training in (False, True):
            net.train(training)(inputs())
            assert tuple(gammas(net).values()) == expected
    again = mfx.momentumize(Stages(), gamma=0.9)  # the graph for eval() is captured only now
    mfx.set_gamma(again, {"b*": 0.5})
    again.eval()(inputs())
    assert tuple(gammas(again).values()) == (0.9, 0.5, 0.9)


def test_a_module_that_contains_nets():
    first, second = mfx.momentumize(Stack()), mfx.momentumize(Stages())
    both = nn.ModuleDict({"first": first, "second": second})
    mfx.set_gamma(both, 0.5)
    assert {*gammas(first).values(), *gammas(second).values()} == {0.5}
    mfx.set_gamma(both, {"blocks": 0.25})
    assert (gammas(first), gammas(second)["a.fcs"]) == ({"blocks": 0.25}, 0.5)
    second.a = Inner()  # captured anew, where no chain is called blocks
    assert gammas(second)["a.fcs"] == 0.5


def test_a_graph_module():
    torch.manual_seed(0)
    model, x = Stack().double(), inputs(dtype=torch.float64)
    net = mfx.momentumize(mfx.trace(model))
    mfx.set_gamma(net, 0.25)
    torch.testing.assert_close(net(x), stack_recurrence(model, x, 0.25), **TOLERANCE)
    mfx.set_gamma(net, {"*": 0.0})
    torch.testing.assert_close(net(x), stack_recurrence(model, x, 0.0), **TOLERANCE)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gamma, message",
    [
        (1.0, r"gamma must be a real number with 0 <= gamma < 1, not 1\.0"),
        ({"blocks": -0.5}, "gamma must be"),
        ("0.5", "gamma must be .* not '0.5'"),
        (None, "gamma must be"),
        ({}, "gamma={}: a mapping goes from chain names"),
        (1e-7, "cannot be told from 0; the nearest gamma that works is 1/16384"),
        ({"*": 1 - 1e-7}, "cannot be told from 1; the nearest gamma that works is 16383/16384"),
        ({"blocks": 0.5, "blokcs": 0.5}, "gamma: no chain is called 'blokcs'. Chains: blocks"),
    ],
)
def test_refused_and_nothing_changed(gamma, message):
    for net in (mfx.momentumize(Stack(), gamma=0.75), mfx.momentumize(mfx.trace(Stack()), gamma=0.75)):
        with pytest.raises(mfx.MfxError, match=message):
            mfx.set_gamma(net, gamma)
        assert gammas(net) == {"blocks": 0.75}


@pytest.mark.parametrize(
    "net, message",
    [
        (Stack(), "Stack has not been momentumized, so it has no gamma to set"),
        (Stack, "takes a momentumized net, not the class Stack"),
        (None, "not a NoneType"),
    ],
)
def test_not_a_net(net, message):
    with pytest.raises(mfx.MfxError, match=message):
        mfx.set_gamma(net, 0.5)
