"""MomentumNet against the momentumnet package by ordinary backprop, and what that package cannot do.

Tolerances: states have 40 fraction bits, so a floor a step, remembered by v and summed up by x, is at most n·2⁻⁴⁰·T^1.5
after T steps at γ = n/d; functions and their derivatives are of order 1, and CONDITION is how much an error may grow on
its way to the loss and back.
"""

import copy
import io
import pickle

import momentumnet
import pytest
import torch
from torch import nn

import mfx

WIDTH, CONDITION = 3, 30


def bound(net):
    return CONDITION * net.chain.gamma.numerator * 2**-40 * len(net.functions) ** 1.5


def functions(count, width=WIDTH):
    torch.manual_seed(2)
    return [nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, width)).double() for _ in range(count)]


def both(*args, use_backprop=False, **kwargs):
    return mfx.MomentumNet(*args, use_backprop=use_backprop, **kwargs), momentumnet.MomentumNet(*args, **kwargs)


def loss_of(net, x, *args):
    return (net(x, *args) ** 2 + net(x, *args) ** 3).sum()  # two calls in one graph


def assert_same_function(ours, theirs, *inputs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    tolerance = bound(ours)
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=tolerance, atol=tolerance)
    wanted = [*theirs.parameters(), *(t for t in inputs if t.requires_grad)]
    expected = torch.autograd.grad(loss_of(theirs, *inputs), wanted)
    actual = torch.autograd.grad(loss_of(ours, *inputs), wanted)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm(), 1)


@pytest.mark.parametrize("use_backprop", [True, False])
@pytest.mark.parametrize("is_residual", [True, False])
@pytest.mark.parametrize("init", [None, nn.Tanh(), nn.Linear(WIDTH, WIDTH).double()])
@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_outputs_and_gradients(gamma, init, is_residual, use_backprop):
    options = {"init_speed": init is not None, "init_function": init, "is_residual": is_residual}
    nets = both(functions(8), gamma=gamma, use_backprop=use_backprop, **options)
    assert_same_function(*nets, torch.rand(4, WIDTH, dtype=torch.float64, requires_grad=True))


class Mixed(nn.Module):
    """A function of several inputs."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, WIDTH).double() for width in widths)

    def forward(self, x, *others):
        return sum(layer(t) for layer, t in zip(self.layers, (x, *others), strict=True)).tanh()


@pytest.mark.parametrize("use_backprop", [True, False])
@pytest.mark.parametrize("requires_grad", [(False,), (True,), (True, False)])
def test_further_inputs(requires_grad, use_backprop):
    widths = [WIDTH, 2, 4][: 1 + len(requires_grad)]
    nets = both([Mixed(*widths) for _ in range(5)], gamma=0.9, use_backprop=use_backprop)
    others = [
        torch.randn(4, width, dtype=torch.float64, requires_grad=flag)
        for width, flag in zip(widths[1:], requires_grad, strict=True)
    ]
    assert_same_function(*nets, torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True), *others)


@pytest.mark.parametrize("use_backprop", [True, False])
def test_batchnorm_in_eval_mode(use_backprop):
    ours, theirs = both(nn.Sequential(*(nn.BatchNorm2d(3).double() for _ in range(10))), 0.9, use_backprop=use_backprop)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert_same_function(ours.eval(), theirs.eval(), x)


@pytest.mark.parametrize("use_backprop", [True, False])
def test_shapes(use_backprop):
    x = torch.rand(3)
    fits = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert mfx.MomentumNet([fits], gamma=0.9, use_backprop=use_backprop)(x).shape == x.shape
    wrong = mfx.MomentumNet([fits, nn.Linear(3, 4)], gamma=0.9, use_backprop=use_backprop)
    with pytest.raises(mfx.MfxError, match=r"step 1: the branch gave a tensor of shape \(4,\)"):
        wrong(x)
    broken = mfx.MomentumNet([nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 3))], use_backprop=use_backprop)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        broken(x)


@pytest.mark.parametrize("gamma", [0.01, 0.5, 0.9])
def test_states_are_rebuilt_bit_for_bit(gamma):
    """The package's own integers cannot do this: negative velocities, depth past any one store."""
    fs, x = functions(64), torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    rebuilt, kept = (mfx.MomentumNet(fs, gamma, use_backprop=flag, verify="raise") for flag in (False, True))
    wanted = (x, *rebuilt.parameters())
    assert torch.equal(rebuilt(x), kept(x))
    pairs = zip(*(torch.autograd.grad(loss_of(net, x), wanted) for net in (rebuilt, kept)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_gamma_zero_is_the_residual_network():
    fs, x = functions(4), torch.randn(4, WIDTH, dtype=torch.float64)
    expected = x
    for f in fs:
        expected = expected + f(expected)
    assert torch.equal(mfx.MomentumNet(fs, 0.0, use_backprop=False)(x), expected)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("init", [None, nn.Linear(WIDTH, WIDTH).double()])
def test_at_gamma_one_the_velocity_stays(init, arithmetic):
    """The package by ordinary backprop; its memory mode takes γ = 32769/32768 instead."""
    options = {"init_speed": init is not None, "init_function": init}
    theirs = momentumnet.MomentumNet(functions(8), gamma=1, **options)
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    for use_backprop in (True, False):
        ours = mfx.MomentumNet(theirs.functions, 1, **options, use_backprop=use_backprop, arithmetic=arithmetic)
        assert_same_function(ours, theirs, x)
        v = torch.zeros_like(x) if init is None else init(x)
        assert_close_to_fixed_point(ours(x), x + 8 * v)


def assert_close_to_fixed_point(actual, expected):
    """X and v are rounded to 40 fraction bits, and v is added eight times."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=9 * 2**-41)


def test_gamma_one_is_set_and_saved():
    net, x = mfx.MomentumNet(functions(3), 0.5, use_backprop=False), torch.randn(2, WIDTH, dtype=torch.float64)
    mfx.set_gamma(net, 1)
    assert_close_to_fixed_point(net(x), x)
    with pytest.warns(UserWarning, match=r"saved at gamma = 1\.0.*mfx\.set_gamma\(net, 1\.0\)"):
        mfx.MomentumNet(functions(3), 0.5).load_state_dict(net.state_dict())
    with pytest.raises(mfx.MfxError, match="no branch would count"):
        mfx.momentumize(nn.Sequential(nn.Linear(WIDTH, WIDTH)), gamma=1)


class Step(nn.Module):
    """Everything the package's memory mode gets wrong or breaks on: dropout, batch statistics, other arguments."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)
        self.unused = nn.Linear(1, 1)
        self.linear.bias.requires_grad_(False)

    def forward(self, x, scale, mask=None, *, options=None, shift=0):
        y = self.drop(self.norm(self.linear(x))) * options["scale"] * scale + shift
        return y if mask is None else y.masked_fill(mask, 0.0)


def test_training_step_is_that_of_backprop():
    x, scale, mask = torch.randn(8, WIDTH), torch.randn(WIDTH), torch.rand(8, WIDTH) > 0.7
    results = []
    for use_backprop in (True, False):
        torch.manual_seed(0)
        net = mfx.MomentumNet([Step() for _ in range(6)], 0.9, use_backprop=use_backprop, verify="raise")
        for given in (None, mask):
            leaf = scale.clone().requires_grad_()
            net(x, 2, given, options={"scale": leaf, "name": "s"}, shift=1.0).square().sum().backward()
        grads = [p.grad for p in net.parameters()]
        results.append([leaf.grad, torch.get_rng_state(), *net.state_dict().values(), *grads])
    assert any(grad is None for grad in grads)
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_memory_does_not_grow_with_depth():
    def after_forward(depth):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        net = mfx.MomentumNet([block] * depth, 0.9, use_backprop=False)
        x = torch.randn(256, 16)
        with mfx.ActivationMeter(exclude=net.parameters()) as meter:
            kept = net(x)  # noqa: F841
            return meter.live / x.nbytes

    # A step leaves log2(1/0.9) bits of digits; those of 40 steps take two bytes, and those of 80 too.
    assert after_forward(80) == after_forward(40)


def test_attributes_and_copies():
    init, x = nn.Tanh(), torch.randn(2, WIDTH, dtype=torch.float64)
    net = mfx.MomentumNet(functions(3), 0.9, True, init, False, False)
    assert (net.gamma, net.init_speed, net.use_backprop, net.is_residual) == (0.9, True, False, False)
    assert net.init_function is init
    assert len(net.functions) == 3
    expected = net(x)
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(saved, weights_only=False)]
    for copied in copies:
        assert torch.equal(copied(x), expected)
        assert all(a is not b for a, b in zip(copied.parameters(), net.parameters(), strict=True))


def test_set_gamma_and_explain():
    net, x = mfx.MomentumNet(functions(3), 0.9), torch.randn(2, WIDTH, dtype=torch.float64)
    mfx.set_gamma(net, 0.5)
    assert net.gamma == 0.5
    net.gamma = 0.25
    assert torch.equal(net(x), mfx.MomentumNet(net.functions, 0.25)(x))
    (chain,) = mfx.explain(net, x).chains
    assert (chain.gamma, [step.path for step in chain.steps]) == (0.25, ["0", "1", "2"])
    with pytest.warns(UserWarning, match="saved at gamma = 0.25"):
        mfx.MomentumNet(functions(3), 0.9).load_state_dict(net.state_dict())


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_inside_a_momentumized_model():
    def model():
        return nn.Sequential(*(Residual(mfx.MomentumNet(functions(3), 0.5, use_backprop=False)) for _ in range(4)))

    x, results = torch.randn(2, WIDTH, dtype=torch.float64), []
    for budget in (0.0, 1.0):
        net = mfx.momentumize(model(), memory_budget=budget, verify="raise")
        assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]
        output = net(x)
        output.square().sum().backward()
        results.append([output, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # TorchDynamo asks a non-leaf for it, and means to hide that
def test_compiled_and_exported():
    net, x = mfx.MomentumNet(functions(3), 0.9, use_backprop=False), torch.randn(2, WIDTH, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH).double(), net)
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=bound(net), atol=bound(net))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gamma": 1.5}, "gamma must be a real number with 0 <= gamma < 1, not 1.5"),
        ({"gamma": -0.1}, "gamma must be"),
        ({"gamma": {"*": 0.9}}, "gamma must be"),
        ({"functions": []}, "functions is empty"),
        ({"functions": 3}, "functions are modules in a list or a Sequential, not an int"),
        ({"functions": [torch.tanh]}, r"functions\[0\] is a builtin_function_or_method, not a torch.nn.Module"),
        ({"init_speed": True}, "init_speed=True needs a module as init_function"),
        ({"arithmetic": "fixed"}, "arithmetic='fixed'"),
        ({"use_backprop": "no"}, "use_backprop='no': must be True or False"),
        ({"is_residual": None}, "is_residual=None: must be True or False"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(mfx.MfxError, match=message):
        mfx.MomentumNet(**{"functions": functions(2), **arguments})


def test_bad_inputs():
    net = mfx.MomentumNet(functions(2))
    with pytest.raises(mfx.MfxError, match=r"floating-point tensor x, not on torch\.int64"):
        net(torch.ones(2, WIDTH, dtype=torch.int64))
    with pytest.raises(mfx.MfxError, match="floating-point tensor x, not on a list"):
        net([1.0])


@pytest.mark.parametrize(
    "look", [mfx.momentumize, mfx.trace, mfx.draw, mfx.transform_to_momentumnet, torch.fx.symbolic_trace]
)
def test_a_momentum_net_by_itself_has_no_graph(look):
    with pytest.raises(mfx.MfxError, match=r"consists of momentum steps already.*model that contains it"):
        look(mfx.MomentumNet(functions(2)))
