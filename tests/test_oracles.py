"""The oracles on models that can be counted and worked out by hand, and each of them failing."""

import time

import pytest
import torch
import torchvision
from torch import nn

from tests.oracles import assert_close_grads, chained_adds, grads, momentum_reference, residual_adds

# --- residual_adds ----------------------------------------------------------------------------------------------------


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def count(f, *shape, **options):
    return len(residual_adds(f(leaf(*shape)), **options))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "name, adds",
    [
        ("resnet18", 5),  # 8 blocks, 3 of them (the first of layers 2 to 4) with a projection
        ("resnet50", 12),  # 16 blocks, 4 with a projection: layer1 widens from 64 to 256
        ("mobilenet_v2", 10),  # 17 inverted residuals; identity where a stage repeats: 1 + 2 + 3 + 2 + 2
        ("densenet121", 0),
        ("squeezenet1_0", 0),
    ],
)
def test_torchvision(name, adds, train):
    model = getattr(torchvision.models, name)(num_classes=3).train(train)
    assert len(residual_adds(model(torch.randn(2, 3, 64, 64)))) == adds


def test_torchvision_vit():
    model = torchvision.models.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
    assert len(residual_adds(model(torch.randn(2, 3, 32, 32)))) == 6  # two per layer; the add of the positions is none


def test_resnet152_and_swin_are_fast():
    for name, adds in [("resnet152", 46), ("swin_t", 24)]:
        output = getattr(torchvision.models, name)(num_classes=3)(torch.randn(1, 3, 64, 64))
        start = time.process_time()
        assert len(residual_adds(output)) == adds
        assert time.process_time() - start < 2  # 20 ms on an idle machine


def test_adds_come_in_forward_order_with_their_operands():
    x = leaf(2, 6)
    y = x + x.tanh()
    z = y.sigmoid() + y
    first, second = residual_adds(z.reshape(3, 4))
    assert (first.add, second.add) == (y.grad_fn, z.grad_fn)
    assert second.skip.node is y.grad_fn
    assert second.branch.node.name() == "SigmoidBackward0"
    assert first.shape == (2, 6)


class Attention(nn.Module):
    """A pre-norm encoder as people write it by hand, with a class token and positions."""

    def __init__(self, depth):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 8)]) for _ in range(depth)
        )

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for norm1, qkv, norm2, mlp in self.layers:
            x = nn.functional.scaled_dot_product_attention(*qkv(norm1(x)).chunk(3, -1)) + x
            x += mlp(norm2(x)).relu()
        return x[:, 0]


@pytest.mark.parametrize("batch", [1, 2])  # at batch 1 the positions have the stream's shape
def test_a_vit_has_two_adds_per_layer(batch):
    assert len(residual_adds(Attention(depth=3)(torch.randn(batch, 4, 8)))) == 6


class UNet(nn.Module):
    """Two levels down and up; the long skips are added or concatenated, the blocks at the bottom are residual."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.down = nn.ModuleList([nn.Conv2d(4, 4, 2, 2), nn.Conv2d(4, 4, 2, 2)])
        self.bottom = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(4, 4, 2, 2), nn.ConvTranspose2d(4, 4, 2, 2)])

    def forward(self, x):
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for block in self.bottom:
            x = x + block(x).relu()
        for up in self.up:
            x = self.join(skips.pop(), up(x))[:, :4]
        return x


@pytest.mark.parametrize("join, adds", [(torch.add, 3 + 2), (lambda a, b: torch.cat([a, b], 1), 3)])
def test_the_long_skips_of_a_unet_are_residual_adds_if_they_are_added(join, adds):
    assert count(UNet(join), 1, 4, 8, 8) == adds


def inplace(x):
    y = x.tanh()
    y += x
    return y


@pytest.mark.parametrize(
    "adds, f",
    [
        (1, lambda x: x + x.tanh()),
        (1, lambda x: x.tanh() + x),
        (1, lambda x: torch.add(x, x.tanh(), alpha=0.5)),
        (1, inplace),
        (1, lambda x: x + x.tanh() * x.mean()),  # the branch may read the skip more than once
        (1, lambda x: x + x.tanh() + x.sigmoid()),  # an n-ary sum counts once
        (1, lambda x: x + (x.tanh() + x.sigmoid())),
        (0, lambda x: x.tanh() + x.sigmoid()),
        (0, lambda x: x + x),
        (0, lambda x: x + x.clone()),
        (0, lambda x: x + 1),
        (0, lambda x: x + x.mean(1, keepdim=True)),  # broadcasts
        (0, lambda x: x + x.detach().tanh()),
        (0, lambda x: x * x.tanh()),
        (0, lambda x: torch.cat([x, x.tanh()])),
    ],
)
def test_spellings(adds, f):
    assert count(f, 4, 4) == adds


def test_a_sibling_output_of_the_same_node_is_not_the_skip():
    def reversible(x):
        x1, x2 = x.chunk(2, -1)
        return x1 + x2.tanh()

    def halves(x):
        x1, _ = x.chunk(2, -1)
        return x1 + x1.tanh()

    assert count(reversible, 4, 4) == 0
    assert count(halves, 4, 4) == 1


def test_relayouts_are_seen_through_on_request():
    def flat(x):  # OPT reshapes the stream between reading and adding
        return x.reshape(6, 4) + x.tanh().reshape(6, 4)

    def cast(x):  # Mamba keeps the residual in float32
        return x.float() + x.tanh().float()

    for f, x in [(flat, leaf(2, 3, 4)), (cast, leaf(2, 3).double().detach().requires_grad_())]:
        assert len(residual_adds(f(x))) == 1
        assert len(residual_adds(f(x), through_relayouts=False)) == 0


def test_a_custom_function_is_a_branch_like_any_other():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    assert count(lambda x: x + Double.apply(x), 4) == 1


def test_a_long_chain_takes_linear_time():
    def chain(n):
        x = leaf(2)
        for _ in range(n):
            x = x + x.tanh().tanh()
        return x

    output = chain(5000)
    start = time.process_time()
    assert len(residual_adds(output)) == 5000
    assert time.process_time() - start < 10  # 0.3 s on an idle machine; quadratic would be minutes


# --- chained_adds -----------------------------------------------------------------------------------------------------


def block(x):
    return x + x.tanh()


def post_norm(x):
    return nn.functional.layer_norm(block(x), (6,), torch.ones(6, requires_grad=True))


@pytest.mark.parametrize(
    "f, chained, adds",
    [
        (block, 0, 1),
        (lambda x: block(block(x)), 2, 2),
        (lambda x: block(block(x).relu()), 2, 2),
        (lambda x: block(nn.functional.dropout(block(x)).t()), 2, 2),
        (lambda x: post_norm(post_norm(post_norm(x))), 3, 3),
        (lambda x: block(block(x) @ torch.ones(6, 6)), 0, 2),  # another state
        (lambda x: block(block(block(x)) @ torch.ones(6, 6)), 2, 3),
        (lambda x: block(block(x).relu() * block(x).sigmoid()), 0, 3),  # two paths
        (lambda x: x + block(x.sin()).cos(), 0, 2),  # one inside of the other
        (lambda x: x + block(block(x.sin())).cos(), 2, 3),
        (lambda x: (y := block(x)) + y.sin() + (y + y.cos()).sin(), 2, 3),  # one sum, twice a skip
        (lambda x: block(block(y := block(x))) + block(y).sin(), 3, 4),  # the chain goes on the longer way
        (lambda x: block(block(y := block(x))) + block(block(block(y))).sin(), 6, 6),  # two begin anew
    ],
)
def test_adds_in_chains(f, chained, adds):
    y = f(leaf(6, 6))
    assert (len(chained_adds(y)), len(residual_adds(y))) == (chained, adds)


@pytest.mark.parametrize("name, chained", [("resnet18", 2), ("resnet50", 12), ("mobilenet_v2", 9)])
def test_adds_in_chains_of_torchvision(name, chained):
    """resnet18 has blocks 2, 1, 1, 1 without a projection; resnet50 2, 3, 5, 2; mobilenet_v2 1, 2, 3, 2 and 2."""
    model = getattr(torchvision.models, name)(num_classes=3)
    assert len(chained_adds(model(torch.randn(2, 3, 64, 64)))) == chained


def test_an_output_without_history_is_refused():
    with pytest.raises(ValueError, match="run the model with gradients enabled"):
        residual_adds(torch.zeros(1))


# --- momentum_reference -----------------------------------------------------------------------------------------------


def scalar(value):
    return torch.tensor([value], dtype=torch.float64)


def test_two_steps_by_hand():
    reference = momentum_reference([lambda x: 2 * x, lambda x: -x], scalar(1.0), gamma=0.75)
    # v1 = .25·2 = .5, x1 = 1.5; v2 = .75·.5 + .25·(−1.5) = 0, x2 = 1.5
    assert [v.item() for v in reference.velocities] == [0, 0.5, 0]
    assert [x.item() for x in reference.taps] == [1, 1.5, 1.5]
    assert reference.output is reference.taps[-1]


def test_a_map_is_the_residual_function_plus_the_identity():
    functions = [torch.tanh, torch.sin, torch.cos]
    x = torch.randn(5, dtype=torch.float64)
    expected = momentum_reference(functions, x, 0.9)
    actual = momentum_reference([lambda x, f=f: x + f(x) for f in functions], x, 0.9, kind="map")
    torch.testing.assert_close(actual.output, expected.output, rtol=1e-14, atol=1e-15)


def test_gamma_zero_is_the_residual_network():
    x = torch.randn(5, dtype=torch.float64)
    y = x + x.tanh()
    assert torch.equal(momentum_reference([torch.tanh, torch.sin], x, 0.0).output, y + y.sin())


@pytest.mark.parametrize(
    "velocity, v0, v1",
    [
        ("zero", 0.0, 0.5),
        ("residual", 2.0, 2.0),  # v1 = γ f0 + (1 − γ) f0 = f0
        (scalar(4.0), 4.0, 3.5),
        (lambda x: 8 * x, 8.0, 6.5),
    ],
)
def test_initial_velocities(velocity, v0, v1):
    reference = momentum_reference([lambda x: 2 * x], scalar(1.0), 0.75, velocity=velocity)
    assert [v.item() for v in reference.velocities] == [v0, v1]
    assert reference.output.item() == 1 + v1


def test_the_residual_velocity_evaluates_each_function_once():
    calls = []
    momentum_reference([lambda x: calls.append(0) or 2 * x] * 3, scalar(1.0), 0.5, velocity="residual")
    assert len(calls) == 3


def test_gradients_are_right():
    weights = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def f(x, *weights):
        reference = momentum_reference([lambda x, w=w: (x @ w).tanh() for w in weights], x, 0.9)
        return reference.output, reference.taps[1], reference.velocities[-1]

    assert torch.autograd.gradcheck(f, (x, *weights))


def test_the_reference_refuses_other_precisions():
    with pytest.raises(TypeError, match=r"works in float64, not torch.float32"):
        momentum_reference([torch.tanh], torch.zeros(1), 0.9)
    with pytest.raises(KeyError, match="one"):
        momentum_reference([torch.tanh], scalar(0.0), 0.9, velocity="one")


# --- assert_close_grads -----------------------------------------------------------------------------------------------

EXPECTED = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-9]), "c": None}


def changed(**entries):
    return {**EXPECTED, **entries}


def test_equal_gradients_pass():
    assert assert_close_grads(EXPECTED, changed(), rel=0) == 0


def test_the_largest_error_is_returned():
    assert assert_close_grads(changed(a=torch.tensor([3.0, 4.5])), EXPECTED, rel=0.2) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "actual, complaint",
    [
        (changed(a=torch.tensor([3.0, 4.5])), r"1 of 3 .*\n  a: relative error 1\.00e-01 > 1e-02"),
        (changed(b=torch.tensor([2e-9])), "b: relative error 1.00e"),
        (changed(a=torch.tensor([3.0, float("nan")])), "a: relative error nan"),
        (changed(a=None), "a: no gradient, expected one"),
        (changed(c=torch.zeros(1)), "c: a gradient, expected none"),
        (changed(a=torch.tensor([[3.0, 4.0]])), "a: shape"),
        (changed(d=None), "different parameters: .'d'."),
        ({"a": EXPECTED["a"]}, "different parameters: .'b', 'c'."),
    ],
)
def test_the_comparison_can_fail(actual, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_close_grads(actual, EXPECTED, rel=1e-2)


def test_noise_is_excused_only_on_request_and_only_when_small():
    actual = changed(b=torch.tensor([2e-9]))
    assert assert_close_grads(actual, EXPECTED, rel=1e-2, noise=1e-7) < 1e-2
    with pytest.raises(AssertionError, match="b: relative error"):
        assert_close_grads(actual, EXPECTED, rel=1e-2, noise=1e-9)


def test_a_zero_gradient_must_be_zero():
    zero = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert assert_close_grads(zero, zero, rel=1e-6) == 0
    with pytest.raises(AssertionError, match="a: relative error inf"):
        assert_close_grads({**zero, "a": torch.full((2,), 1e-30)}, zero, rel=1e-6)


def test_comparing_nothing_is_an_error():
    with pytest.raises(AssertionError, match="no gradient to compare with"):
        assert_close_grads({"a": None}, {"a": None}, rel=1)


def test_grads_are_copies():
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    layer(torch.ones(1, 2)).sum().backward()
    taken = grads(layer)
    layer.weight.grad.zero_()
    assert taken["bias"] is None
    assert torch.equal(taken["weight"], torch.ones(1, 2))
