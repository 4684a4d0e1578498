"""transform_to_momentumnet against the momentumnet package where that runs; where it does not, against its class."""

import copy
import pickle

import momentumnet
import pytest
import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

import mfx
from mfx import transform_to_momentumnet as transform

STAGES = ["layer1", "layer2", "layer3", "layer4"]
PARTS = ["encoder.layers", "decoder.layers"]
CONDITION = 100
"""By how much an error in a state grows on its way to the loss and back; a state has 40 fraction bits, and its error at
γ = n/d is below n·2⁻⁴⁰·T^1.5 after T steps."""


def assert_close(actual, expected, numerator=9, steps=8):
    tolerance = CONDITION * numerator * 2**-40 * steps**1.5
    for a, b in zip(actual, expected, strict=True):
        error = (a - b).detach().norm() / max(float(b.detach().norm()), 1.0)
        assert error <= tolerance, f"{error:.1e} > {tolerance:.1e}"


def outcome(model, *inputs, **kwargs):
    """Output, and gradients of parameters and inputs."""
    model.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = model(*leaves, **kwargs)
    (output**2 + output**3).mean().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in model.parameters())]


def resnet(block, layers):
    torch.manual_seed(0)
    size = {"width_per_group": 8} if block is Bottleneck else {}
    return ResNet(block, layers, num_classes=4, **size).double().eval()


@pytest.mark.parametrize("use_backprop", [True, False])
@pytest.mark.parametrize("block, layers", [(BasicBlock, [2, 2, 1, 2]), (Bottleneck, [2, 3, 2, 2])])
def test_resnet(block, layers, use_backprop):
    model, x = resnet(block, layers), torch.randn(2, 3, 33, 33, dtype=torch.float64)
    reference = momentumnet.transform_to_momentumnet(model, STAGES, gamma=0.9, use_backprop=True)
    net = transform(model, STAGES, gamma=0.9, use_backprop=use_backprop, verify="raise")
    assert_close(outcome(net, x), outcome(reference, x))


def test_training_step_is_that_of_backprop():
    model, x = resnet(BasicBlock, [2, 2, 1, 1]).train(), torch.randn(4, 3, 33, 33, dtype=torch.float64)
    state, results = copy.deepcopy(model.state_dict()), []
    for use_backprop in (True, False):
        model.load_state_dict(state)
        net = transform(model, STAGES, use_backprop=use_backprop, verify="raise", keep_first_layer=True)
        results.append([*outcome(net, x), *map(torch.clone, net.state_dict().values())])
    assert int(net.bn1.num_batches_tracked) == int(net.layer1[1].bn1.num_batches_tracked) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_same_weights():
    model = resnet(BasicBlock, [2, 2, 1, 1])
    net = transform(model, STAGES)
    assert type(net) is ResNet
    assert list(net.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    with mfx.original(net):
        assert torch.equal(net(x), model(x))
    assert not torch.allclose(net(x), model(x))
    mfx.set_gamma(net, 0.0)
    assert torch.equal(net(x), model(x))
    assert {chain.name: len(chain.steps) for chain in mfx.explain(net).chains} == {"layer1.1": 1, "layer2.1": 1}


def test_without_sub_layers_chains_are_found():
    model, x = resnet(Bottleneck, [3, 1, 1, 1]), torch.randn(1, 3, 33, 33, dtype=torch.float64)
    assert torch.equal(transform(model, gamma=0.5)(x), mfx.momentumize(model, gamma=0.5)(x))
    assert [chain.name for chain in mfx.explain(transform(model, gamma=0.5)).chains] == ["layer1"]


# --- nn.Transformer, whose forward goes through the layers by itself and hands them masks by name ------------------


class Masked(nn.Module):
    """A layer with its masks, for the package's class, which knows no arguments by name."""

    def __init__(self, layer, **masks):
        super().__init__()
        self.layer, self.masks = layer, masks

    def forward(self, *args):
        return self.layer(*args, **self.masks)


class Reference(nn.Module):
    """nn.Transformer's encoder and decoder as momentum nets of the package."""

    def __init__(self, model, gamma, tgt_mask=None, src_key_padding_mask=None):
        super().__init__()
        options = {"gamma": gamma, "use_backprop": True, "is_residual": False}
        encoder = [Masked(layer, src_key_padding_mask=src_key_padding_mask) for layer in model.encoder.layers]
        decoder = [Masked(layer, tgt_mask=tgt_mask) for layer in model.decoder.layers]
        self.encoder, self.encoder_norm = momentumnet.MomentumNet(encoder, **options), model.encoder.norm
        self.decoder, self.decoder_norm = momentumnet.MomentumNet(decoder, **options), model.decoder.norm

    def forward(self, src, tgt):
        return self.decoder_norm(self.decoder(tgt, self.encoder_norm(self.encoder(src))))


def transformer(depth=2, width=8, **options):
    torch.manual_seed(0)
    return nn.Transformer(width, 2, depth, depth, 16, batch_first=True, dtype=torch.float64, **options)


def sentences(width=8):
    torch.manual_seed(1)
    return torch.randn(2, 5, width, dtype=torch.float64), torch.randn(2, 4, width, dtype=torch.float64)


MASKS = {
    "none": {},
    "masks": {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        "src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    },
}


@pytest.mark.parametrize("masks", [pytest.param("none", marks=pytest.mark.zoo), "masks"])
def test_transformer(masks):
    model, given = transformer(dropout=0.0), sentences()
    net = transform(model, PARTS, gamma=0.99, keep_first_layer=False, verify="raise")
    expected = outcome(Reference(model, 0.99, **MASKS[masks]), *given)
    assert_close(outcome(net, *given, **MASKS[masks]), expected, numerator=99)
    found = {chain.name: [step.path for step in chain.steps] for chain in mfx.explain(net, *given).chains}
    assert found == {part: [f"{part}.{number}" for number in range(2)] for part in PARTS}
    assert list(net.state_dict()) == list(model.state_dict())


def test_transformer_with_dropout():
    model, given, results = transformer(dropout=0.3), sentences(), []
    for use_backprop in (True, False):
        torch.manual_seed(2)
        net = transform(model, PARTS, use_backprop=use_backprop, keep_first_layer=False, verify="raise")
        results.append([*outcome(net, *given), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- small nets -----------------------------------------------------------------------------------------------------


def maps(count, width=4):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)) for _ in range(count)))


class Small(nn.Module):
    """Two layers of the same width in a row: the second starts with velocity 0 again."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = maps(3).double(), maps(3).double(), nn.Linear(4, 2).double()

    def forward(self, x):
        return self.head(self.second(self.first(x)))


X = torch.randn(5, 4, dtype=torch.float64)


@pytest.mark.parametrize("is_residual", [True, False])
@pytest.mark.parametrize("keep_first_layer", [True, False])
@pytest.mark.parametrize("sub_layers", [["first", "second"], "second"])
def test_layers_in_a_row(sub_layers, keep_first_layer, is_residual):
    options = {"gamma": 0.9, "keep_first_layer": keep_first_layer, "is_residual": is_residual}
    layers = [sub_layers] if isinstance(sub_layers, str) else sub_layers
    reference = momentumnet.transform_to_momentumnet(Small(), layers, use_backprop=True, **options)
    assert_close(outcome(transform(Small(), sub_layers, **options), X), outcome(reference, X))


def test_one_layer_after_the_other():
    once = transform(Small(), ["first", "second"], gamma=0.5)
    twice = transform(transform(Small(), ["first"], gamma=0.5), ["second"], gamma=0.25)
    mfx.set_gamma(once, {"second": 0.25})
    assert torch.equal(once(X), twice(X))
    assert {chain.name: chain.gamma for chain in mfx.explain(twice).chains} == {"first": 0.5, "second": 0.25}


class Loop(nn.Module):
    """A forward that adds the branches itself: the sum is part of the step."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.functions, self.inplace = maps(4).double(), inplace

    def forward(self, x):
        x = x.tanh()
        for f in self.functions:
            if self.inplace:
                x += f(x)
            else:
                x = x + f(x)
        return x


@pytest.mark.parametrize("inplace", [True, False])
def test_sums_of_the_model_are_taken_into_the_steps(inplace):
    model = Loop(inplace)
    net = transform(model, "functions", is_residual=True, keep_first_layer=False, verify="raise")
    momentum = momentumnet.MomentumNet(model.functions, gamma=0.9)
    expected = outcome(nn.Sequential(nn.Tanh(), momentum), X)
    assert_close(outcome(net, X), expected)
    assert torch.equal(net(X), mfx.momentumize(model)(X))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(*[nn.Linear(4, 4).double()] * 4)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


def test_a_module_in_several_places_and_a_layer_called_twice():
    options = {"gamma": 0.9, "keep_first_layer": False}
    reference = momentumnet.transform_to_momentumnet(Shared(), ["layer"], use_backprop=True, **options)
    net = transform(Shared(), ["layer"], **options)
    assert list(net.state_dict()) == list(Shared().state_dict())
    assert_close(outcome(net, X), outcome(reference, X))


def test_a_layer_by_itself_copies_and_hooks():
    net, seen = transform(Small(), ["first"], keep_first_layer=False), []
    reference = momentumnet.MomentumNet(net.first, 0.9, is_residual=False)
    assert_close([net.first(X)], [reference(X)])
    assert_close([net(X)], [net.head(net.second(reference(X)))])
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(X), net(X))
    net.first[1].register_forward_hook(lambda *_: seen.append(mfx.recomputing()))
    net(X).sum().backward()
    assert seen == [False, True]
    net.first[1] = nn.Linear(4, 4).double()
    assert_close([net(X)], [net.head(net.second(momentumnet.MomentumNet(net.first, 0.9, is_residual=False)(X)))])


# --- modules that give tuples, with which the package fails --------------------------------------------------------


class WithByproduct(nn.Module):
    """A map with a byproduct, or without."""

    def __init__(self, gives):
        super().__init__()
        self.linear, self.gives = nn.Linear(4, 4).double(), gives

    def forward(self, x):
        y = self.linear(x).tanh()
        return {"pair": (y, y.square().sum()), "single": (y,), "mapping": {"h": y}}[self.gives]


class Stack(nn.Module):
    def __init__(self, gives, route):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.route = nn.ModuleList(WithByproduct(gives) for _ in range(3)), route

    def forward(self, x):
        if self.route == "dynamo" and len(x) < 1:  # which a symbolic trace cannot know
            return x
        more = 0.0
        for layer in self.layers:
            out = layer(x)
            x = out["h"] if self.layers[0].gives == "mapping" else out[0]
            more = more + (out[1] if self.layers[0].gives == "pair" else 0.0)
        return x * (1 + more)


def by_hand(model, x, gamma):
    v, more, outs = torch.zeros_like(x), 0.0, []
    for layer in model.layers:
        outs.append(layer(x))
        v = gamma * v + (1 - gamma) * (outs[-1][0] - x)
        x, more = x + v, more + (outs[-1][1] if len(outs[-1]) > 1 else 0.0)
    return x * (1 + more)


@pytest.mark.parametrize("use_backprop", [True, False])
@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
@pytest.mark.parametrize("gives", ["pair", "single"])
def test_of_a_tuple_the_first_part_is_the_state(gives, route, use_backprop):
    model = Stack(gives, route)
    net = transform(model, "layers", use_backprop=use_backprop, keep_first_layer=False, verify="raise")
    actual = outcome(net, X)
    net_by_hand = copy.deepcopy(model)
    net_by_hand.forward = lambda x: by_hand(net_by_hand, x, 0.9)
    assert_close(actual, outcome(net_by_hand, X))


@pytest.mark.parametrize("route", ["symbolic", "dynamo"])
def test_other_containers_are_refused(route):
    message = "layers.1 of layers is not called on what the module before it gave, but on getitem"
    with pytest.raises(mfx.MfxError, match=message):
        transform(Stack("mapping", route), "layers", keep_first_layer=False)(X)


# --- what is refused ------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that are not chains."""

    def __init__(self):
        super().__init__()
        self.layers, self.wide = maps(3), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        self.pairs = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))

    def forward(self, x, how: str = "between"):
        for (linear,) in self.pairs:
            x = x + linear(x)
        if how == "wide":
            return self.wide(x)
        for layer in reversed(self.layers) if how == "order" else self.layers:
            x = layer(x) if how == "order" else layer(x) + x
        return x


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sub_layers": "layer"}, "'layer' is not there in Odd.*There are: 'layers'"),
        ({"sub_layers": ["layers.0.0"]}, "'layers.0.0' is a Linear in Odd"),
        ({"sub_layers": [3]}, "3 is not there"),
        ({"sub_layers": []}, "sub_layers is empty"),
        ({"sub_layers": ["layers", "layers"]}, "names layers twice"),
        ({"sub_layers": "layers", "gamma": 1.0}, "gamma must be.*not 1.0: no branch would count"),
        ({"sub_layers": "layers", "use_backprop": 2}, "use_backprop=2: must be True or False"),
        ({"is_residual": True}, "is_residual=True is about the modules in sub_layers"),
        ({"sub_layers": "layers"}, r"layers.2 of layers is not called on what the module before it gave"),
        ({"sub_layers": "pairs"}, "does not call pairs.0, of the sub layer pairs, as a module on its own"),
    ],
)
def test_refused(options, message):
    with pytest.raises(mfx.MfxError, match=message):
        transform(Odd(), **options)


def test_refused_later():
    class Wide(Odd):
        def forward(self, x):
            return super().forward(x, "wide")

    class Reversed(Odd):
        def forward(self, x):
            return super().forward(x, "order")

    with pytest.raises(mfx.MfxError, match="layers are not called one after the other in the order they are listed in"):
        transform(Reversed(), "layers")
    net = transform(Wide(), "wide", keep_first_layer=False)
    for _ in range(2):
        with pytest.raises(mfx.MfxError, match=r"wide.0: the step changes the stream from \(5, 4\).*to \(5, 6\)"):
            net(X.float())


def test_refused_models():
    with pytest.raises(mfx.MfxError, match=r"takes a torch\.nn\.Module, not the class Small"):
        transform(Small)
    net = transform(Small(), "first")
    with pytest.raises(mfx.MfxError, match="first: transformed before"):
        transform(net, "first")
    with pytest.raises(mfx.MfxError, match="one use_backprop, arithmetic, verify and offload for all its layers"):
        transform(net, "second", use_backprop=True)
    with pytest.raises(mfx.MfxError, match="its chains were found by themselves"):
        transform(mfx.momentumize(Loop(False)), "functions")
    with pytest.raises(mfx.MfxError, match="a GraphModule is a graph already"):
        transform(mfx.trace(Small()), "first")
