"""torch's own contexts and transforms around a net."""

import warnings

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import ConvNet, Stack, images, inputs


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
