"""The package that this one succeeds, by ordinary backprop in float64: an implementation that shares no line with ours.

``transform_to_momentumnet`` turns the blocks of a stage after the first, which widens the stream, into a momentum chain
in which f is block(x) − x. In a bottleneck ResNet those are the chains that mfx finds by itself.
"""

import pytest
import torch
from momentumnet import transform_to_momentumnet
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck

import mfx
from tests.models.step import deterministic, loss_of
from tests.oracles import assert_close_grads, grads

GAMMA = 0.9
STAGES = ["layer1", "layer2", "layer3", "layer4"]
LAYERS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


def resnet(depth):
    torch.manual_seed(0)
    return ResNet(Bottleneck, LAYERS[depth], num_classes=10, width_per_group=16).double()


def original_name(name):
    """layer1.1.0.network.4.conv1.weight is what they call layer1.5.conv1.weight."""
    head, inside, tail = name.partition(".1.0.network.")
    if not inside:
        return name
    number, _, rest = tail.partition(".")
    return f"{head}.{int(number) + 1}.{rest}"


CONDITION = 10
"""By how much an error in a state grows on its way to the loss and back. Blocks end in BatchNorm, so states, branches
and their derivatives are of order 1 relative to each other; measured: below 1."""


def exact_bound(depth):
    """States have 40 fraction bits: a floor a step, remembered by v and summed up by x, is n·2⁻⁴⁰·T^1.5 a chain."""
    return CONDITION * sum(9 * 2**-40 * (blocks - 1) ** 1.5 for blocks in LAYERS[depth])


def float_bound(depth):
    """Rebuilding divides the rounding error of v by γ a step; a branch sums over up to 10³ terms, each rounded."""
    return CONDITION * 1e2 * 2**-52 * GAMMA ** -max(LAYERS[depth])


def step(model, x):
    with deterministic():
        output = model(x)
        loss_of([output]).backward()
    return output.detach(), grads(model)


@pytest.mark.parametrize(
    "depth", [50, pytest.param(101, marks=pytest.mark.zoo), pytest.param(152, marks=pytest.mark.zoo)]
)
def test_outputs_and_gradients(depth):
    model = resnet(depth)
    reference = transform_to_momentumnet(
        model, sub_layers=STAGES, gamma=GAMMA, use_backprop=True, is_residual=False, keep_first_layer=True
    )
    assert [original_name(name) for name, _ in reference.named_parameters()] == [n for n, _ in model.named_parameters()]
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected, theirs = step(reference, x)
    theirs = {original_name(name): grad for name, grad in theirs.items()}
    for arithmetic, bound in [("float", float_bound(depth)), ("exact", exact_bound(depth))]:
        net = mfx.momentumize(model, gamma=GAMMA, arithmetic=arithmetic, verify="raise")
        assert [len(chain.steps) for chain in mfx.explain(net).chains] == [n - 1 for n in LAYERS[depth]]
        output, ours = step(net, x)
        error = float((output - expected).norm() / expected.norm())
        assert error <= bound, f"{arithmetic}: outputs differ by {error:.1e}, more than {bound:.1e}"
        assert_close_grads(ours, theirs, bound)
        model.zero_grad()
