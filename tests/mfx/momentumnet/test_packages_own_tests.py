"""The momentumnet package's own tests, by their names, for the same names imported from here.

tests/test_momentum_net.py: test_dimension_layers, test_outputs_memory, test_outputs_memory_multiple_args,
test_two_inputs, test_three_inputs. tests/test_transform.py: test_resnet_vision, test_transformer,
test_outputs_transformer, test_outputs_gradients_bn, test_outputs_gradients_resnets. tests/test_exact_repr.py:
test_val_torch.

They compare training without stored activations with ordinary backpropagation, to tolerances of 1e-5 to 1e-3. Here the
two are the same, bit for bit. That both are what the package computes is in test_momentumnet.py and test_transform.py.
"""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet101

from mfx import MfxError, MomentumNet, transform_to_momentumnet
from mfx.engine.arithmetic.exact import ExactState
from mfx.options.gamma import Gamma

RESNETS = [resnet18, pytest.param(resnet101, marks=pytest.mark.zoo)]
LAYERS = ["encoder.layers", "decoder.layers"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(2)


def both_ways(make, *inputs, loss=lambda y: (y**2 + y**3).sum()):
    """Outputs and gradients of inputs and parameters, by ordinary backpropagation and without stored activations."""
    results = []
    for use_backprop in (True, False):
        net, leaves = make(use_backprop), [x.clone().requires_grad_(x.requires_grad) for x in inputs]
        output = net(*leaves)
        wanted = [*(leaf for leaf in leaves if leaf.requires_grad), *net.parameters()]
        results.append([output, *torch.autograd.grad(loss(output), wanted)])
    return results


def assert_same(results):
    assert len(results[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def tanh_layers(width=3, hidden=5):
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))


class Several(nn.Module):
    """The sum of a linear layer of each input."""

    def __init__(self, *widths, bias=True):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 3, bias=bias) for width in widths)

    def forward(self, *inputs):
        return sum(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


@pytest.mark.parametrize("use_backprop", [True, False])
def test_dimension_layers(use_backprop):
    x = torch.rand(3)
    function = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    assert MomentumNet([function], gamma=0.9, use_backprop=use_backprop)(x).shape == x.shape
    wrong = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        MomentumNet([wrong], gamma=0.9, use_backprop=use_backprop)(x)


@pytest.mark.parametrize("init_speed", [True, False])
def test_outputs_memory(init_speed):
    functions, init = [tanh_layers() for _ in range(8)], tanh_layers() if init_speed else None
    options = {"gamma": 0.99, "init_speed": init_speed, "init_function": init}
    x = torch.rand(3, requires_grad=True)
    assert_same(both_ways(lambda flag: MomentumNet(functions, use_backprop=flag, **options), x))


@pytest.mark.parametrize("init_speed", [True, False])
def test_outputs_memory_multiple_args(init_speed):
    functions, init = [Several(3, 3, bias=False) for _ in range(2)], nn.Tanh() if init_speed else None
    options = {"gamma": 0.9, "init_speed": init_speed, "init_function": init}
    x, memory = torch.randn(10, 3, requires_grad=True), torch.randn(10, 3)
    assert_same(both_ways(lambda flag: MomentumNet(functions, use_backprop=flag, **options), x, memory))


def test_two_inputs():
    functions = [Several(3, 2) for _ in range(3)]
    x, memory = torch.randn(1, 3, requires_grad=True), torch.randn(1, 2, requires_grad=True)
    assert_same(both_ways(lambda flag: MomentumNet(functions, gamma=0.9, use_backprop=flag), x, memory))


def test_three_inputs():
    functions = [Several(3, 2, 4) for _ in range(5)]
    x, memory = torch.randn(10, 3, requires_grad=True), torch.randn(10, 2, requires_grad=True)
    inputs = x, memory, torch.randn(10, 4)
    assert_same(both_ways(lambda flag: MomentumNet(functions, gamma=0.9, use_backprop=flag), *inputs))


@pytest.mark.parametrize("use_backprop", [True, False])
@pytest.mark.parametrize("resnet", RESNETS)
def test_resnet_vision(resnet, use_backprop):
    x = torch.randn(2, 3, 10, 10, requires_grad=True)
    net = transform_to_momentumnet(resnet(), use_backprop=use_backprop, keep_first_layer=True).train()
    net(x).sum().backward()
    assert all(p.grad is not None for p in (x, *net.parameters()))


def transformer(depth=6):
    return nn.Transformer(32, 4, depth, depth, dim_feedforward=64, batch_first=True)


@pytest.mark.zoo
@pytest.mark.parametrize("use_backprop", [True, False])
def test_transformer(use_backprop):
    x, target = (torch.randn(2, 16, 32, requires_grad=True) for _ in range(2))
    net = transform_to_momentumnet(transformer(), LAYERS, use_backprop=use_backprop, keep_first_layer=False)
    net(x, target).sum().backward()
    assert all(p.grad is not None for p in (x, target, *net.parameters()))


@pytest.mark.parametrize("depth", [1, pytest.param(6, marks=pytest.mark.zoo)])
def test_outputs_transformer(depth):
    model, inputs = transformer(depth).eval(), [torch.randn(2, 16, 32, requires_grad=True) for _ in range(2)]
    options = {"gamma": 0.99, "keep_first_layer": False}
    assert_same(both_ways(lambda flag: transform_to_momentumnet(model, LAYERS, use_backprop=flag, **options), *inputs))


def test_outputs_gradients_bn():
    net, x = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(10))), torch.randn(20, 3, 10, 10, requires_grad=True)
    assert_same(both_ways(lambda flag: MomentumNet(net, gamma=0.9, use_backprop=flag).eval(), x))


@pytest.mark.parametrize("resnet", RESNETS)
def test_outputs_gradients_resnets(resnet):
    model, x = resnet().eval(), torch.randn(2, 3, 50, 50, requires_grad=True)
    assert_same(both_ways(lambda flag: transform_to_momentumnet(model, use_backprop=flag, keep_first_layer=True), x))


def test_val_torch():
    """Numbers in fixed point, multiplied, added to, and taken back; 40 fraction bits, so two roundings are 2⁻³⁹."""
    x, half = torch.randn(10, dtype=torch.float64), Gamma.of(0.5)
    state = ExactState.start(x, None, reversible=True)
    for _ in range(3):  # v is 1, then 1.5, then 1.75
        state.advance(torch.full_like(x, 2.0), "residual", half)
    torch.testing.assert_close(state.stream(), x + 4.25, rtol=0, atol=2**-39)
    for _ in range(3):
        state.retreat_x()
        state.retreat_v(torch.full_like(x, 2.0), "residual", half)
    assert torch.equal(state.stream(), ExactState.start(x, None, reversible=False).stream())
    assert state.is_start()


def test_a_momentum_out_of_range_is_refused():
    """The package raises an Exception; its range is closed."""
    for gamma in (-0.1, 1.1):
        with pytest.raises(MfxError, match="gamma must be a real number"):
            MomentumNet([nn.Identity()], gamma)
