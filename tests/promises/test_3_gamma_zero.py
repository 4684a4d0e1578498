"""At γ = 0 a net is the model, bit for bit, whatever the model does and whatever mode the caller has open."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfx
from tests.mfx.models import ConvNet, Stack, images, inputs
from tests.models.step import assert_bit_equal, train_step
from tests.promises.models import MODELS, differences, trained


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("build, shape", MODELS.values(), ids=MODELS)
def test_it_trains_and_evaluates_as_the_model_from_the_first_call_on(build, shape, arithmetic):
    torch.manual_seed(0)
    model = build()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, arithmetic=arithmetic)
    assert differences(trained(net, shape), trained(model, shape)) == []
    assert mfx.explain(net).chains


def test_the_comparison_sees_another_gamma():
    build, shape = MODELS["a stack of blocks"]
    torch.manual_seed(0)
    model = build()
    net = mfx.momentumize(copy.deepcopy(model), gamma=1 / 1024)
    assert "output 0" in differences(trained(net, shape), trained(model, shape))


# --- torch's own contexts and transforms around a net -----------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(context, training):
    net = mfx.momentumize(Stack()).train(training)
    expected = net(inputs())
    with context():
        y = net(inputs())
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)
    net(inputs()).sum().backward()


def test_first_call_in_inference_mode():
    net = mfx.momentumize(Stack())
    with torch.inference_mode():
        net(inputs())
    net(inputs()).sum().backward()


def test_autocast():
    net = mfx.momentumize(Stack())
    reference = mfx.momentumize(Stack(), memory_budget=1.0)
    reference.load_state_dict(net.state_dict())
    for each in (net, reference):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(inputs())
        y.float().sum().backward()
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def test_channels_last():
    net = mfx.momentumize(ConvNet())
    expected = net(images())
    y = net.to(memory_format=torch.channels_last)(images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)
    y.sum().backward()


def test_another_batch_size_and_dtype_of_input():
    net = mfx.momentumize(Stack())
    for batch in (1, 2, 5):
        assert net(inputs(batch)).shape == (batch, 3)


def test_optimizer_steps():
    torch.manual_seed(0)
    net = mfx.momentumize(Stack())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = net(inputs()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_ema_copy():
    net = mfx.momentumize(Stack())
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    torch.testing.assert_close(average(inputs()), net(inputs()))


def test_checkpointed_net():
    net = mfx.momentumize(Stack())
    x = inputs(requires_grad=True)
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).sum().backward()
    mine = x.grad.clone()
    x.grad = None
    net(x).sum().backward()
    assert torch.equal(x.grad, mine)


def test_functional_call():
    net = mfx.momentumize(Stack())
    state = {name: 2 * p.detach() for name, p in net.named_parameters()}
    y = torch.func.functional_call(net, state, (inputs(),))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    torch.testing.assert_close(y, net(inputs()))


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_transforms_of_a_functional_call(budget):
    net = mfx.momentumize(Stack().double(), memory_budget=budget)
    parameters = {name: p.detach() for name, p in net.named_parameters() if name != "unused"}
    xs = inputs(dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    assert [str(w.message) for w in caught if "nothing is rebuilt" in str(w.message)] != [] or budget == 1.0
    for i, x in enumerate(xs):
        net.zero_grad()
        net(x).square().sum().backward()
        for name, p in net.named_parameters():
            if name in found:
                # fixed point rounds states to 2^-41, in six steps
                torch.testing.assert_close(found[name][i], p.grad, rtol=1e-9, atol=1e-9)


def test_meta_models_can_be_explained():
    with torch.device("meta"):
        model = Stack()
        x = torch.empty(2, 8)
    assert len(mfx.explain(model).chains[0].steps) == 6
    assert len(mfx.explain(model, x).chains[0].steps) == 6


def test_parametrized_by_hand():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).transpose(-1, -2)

    net = mfx.momentumize(Stack())
    nn.utils.parametrize.register_parametrization(net.blocks[0].mix, "weight", Symmetric())
    net(inputs()).sum().backward()
    assert net.blocks[0].mix.parametrizations.weight.original.grad is not None


# --- a model that says itself which of its tensors need gradients, as T5 and Wav2Vec2 do ------------------------------


class Biased(nn.Module):
    """Blocks x + f(x)·(bias + 1) that may be checkpointed; the bias is made on the way, or is what the caller gives."""

    def __init__(self, *, checkpoints: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.checkpoints = checkpoints

    def forward(self, x, bias=None):
        if bias is None:
            bias = torch.zeros(4)
        if self.checkpoints:
            bias.requires_grad = True
        for layer in self.layers:
            y = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
            x = x + torch.tanh(y) * (bias + 1)
        return x


def test_a_tensor_of_its_own_that_is_told_to_require_gradients():
    torch.manual_seed(0)
    model, x = Biased(checkpoints=False), torch.randn(2, 4)
    same = Biased(checkpoints=True)
    same.load_state_dict(model.state_dict())
    nets = [mfx.momentumize(each, gamma=0.5, capture="dynamo") for each in (model, same)]
    expected, found = (train_step(net, (x,)) for net in nets)
    assert_bit_equal(found, expected)
    assert [len(chain.steps) for chain in mfx.explain(nets[1]).chains] == [3]
    assert_bit_equal(train_step(mfx.momentumize(same, gamma=0.0), (x,)), train_step(same, (x,)))


def test_the_callers_tensor_is_not_passed_over():
    net = mfx.momentumize(Biased(checkpoints=True), gamma=0.5, capture="dynamo")
    with pytest.raises(mfx.MfxError, match="requires_grad"):
        net(torch.randn(2, 4), torch.zeros(4))


class Noting(nn.Module):
    """Notes outside of the checkpoint what a layer computes in it, as a mixture of experts its router's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, *, checkpoints):
        notes = []

        def branch(layer, x):
            y = layer(x)
            notes.append(y.sum())
            return torch.tanh(y)

        for layer in self.layers:
            x = x + (checkpoint(branch, layer, x, use_reentrant=False) if checkpoints else branch(layer, x))
        return x, torch.stack(notes)


def test_what_is_noted_in_a_checkpoint():
    torch.manual_seed(0)
    model, x = Noting(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.5, capture="dynamo")
    found, expected = (train_step(net, (x,), {"checkpoints": checkpoints}) for checkpoints in (True, False))
    assert_bit_equal(found, expected)
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


class Asking(nn.Module):
    """Goes by what requires a gradient, or returns it."""

    def __init__(self, *, returns: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.returns = returns

    def forward(self, x):
        told = x.detach()
        told.requires_grad = True
        y = told * 1
        x = y * 2 if y.requires_grad and told.is_leaf else y
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return (x, y) if self.returns else x


@pytest.mark.parametrize("returns", [False, True])
def test_who_asks_what_requires_gradients(returns):
    torch.manual_seed(0)
    model, x = Asking(returns=returns), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")
    if returns:
        with pytest.warns(UserWarning, match="only because its requires_grad is set"):
            net(x)
    assert_bit_equal(train_step(net, (x,)), train_step(model, (x,)))


@pytest.mark.parametrize("attribute", ["requires_grad", "data"])
def test_a_symbolic_trace_does_not_record_what_is_set(attribute):
    class Setting(Asking):
        def forward(self, x):
            x = x * 1
            setattr(x, attribute, True if attribute == "requires_grad" else torch.ones(2, 4))
            return super().forward(x)

    with pytest.raises(mfx.MfxError, match=f"{attribute} of a traced value is set"):
        mfx.momentumize(Setting(returns=False), capture="symbolic")


class WithConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = x + torch.linspace(0, 1, 8).sin().to(x.dtype)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_constants_are_of_the_default_dtype_of_the_call():
    model = WithConstant()
    net = mfx.momentumize(model, gamma=0.0)
    x = torch.randn(2, 8)
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            assert torch.equal(net(x), model(x))
    finally:
        torch.set_default_dtype(torch.float32)


def set_default_device(device):
    torch.set_default_device(device)
    stack = contextlib.ExitStack()
    stack.callback(torch.set_default_device, None)
    return stack


@pytest.mark.parametrize("default", [torch.device, set_default_device])
def test_constants_are_on_the_default_device_of_the_call(default):
    net = mfx.momentumize(WithConstant(), gamma=0.0)  # traced where constants are on the CPU
    for device in ("meta", "cpu", "meta"):
        net.to_empty(device=device)
        with default(device):
            assert net(torch.randn(2, 8, device=device)).device.type == device
