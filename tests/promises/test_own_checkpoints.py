"""A model that says itself which of its tensors need gradients, as T5 and Wav2Vec2 do where they checkpoint layers."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfx
from tests.models.step import assert_bit_equal, train_step


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
        with pytest.raises(mfx.MfxError, match="only because its requires_grad is set"):
            net(x)
    else:
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
