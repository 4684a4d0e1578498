"""A loop behind a chain that reads values off tensors: the chain in front of it is run in a piece."""

import copy

import pytest
import torch
from torch import nn

import mfx
from mfx.net.forward import forward_of

pytestmark = pytest.mark.filterwarnings("ignore:mfx. .* cannot be captured as one graph")


class Model(nn.Module):
    """One graph in training; in evaluation it decodes what a chain of its own sums has made, in a loop."""

    always = False

    def __init__(self):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


class Lists(Model):
    def forward(self, x):
        for fc in self.fcs:
            x = x + torch.tanh(fc(x))
        if self.training and not self.always:
            return x
        found = []
        for position in range(x.shape[0]):
            values = [f"{value:.4f}" for value in x[position].tolist()]
            found.append(" ".join(values))
        return x, found


class Numbers(Model):
    def forward(self, x):
        for fc in self.fcs:
            x = x + torch.tanh(fc(x))
        if self.training and not self.always:
            return x
        found = []
        for row in x:
            for value in row.tolist():
                if value > 0 and len(found) < 100:
                    found.append(value)
            found.append(row.max().item())
        return x, found


SERVED = [Lists, Numbers]
X = torch.linspace(-1, 1, 24).reshape(3, 8)


def by_recurrence(model, x, gamma):
    x, v = x.double(), torch.zeros_like(x).double()
    for fc in model.fcs:
        v = gamma * v + (1 - gamma) * torch.tanh(x @ fc.weight.double().T + fc.bias.double())
        x = x + v
    return x


@pytest.mark.parametrize("in_evaluation_first", [False, True])
@pytest.mark.parametrize("build", SERVED)
def test_the_chain_is_that_of_the_training(build, in_evaluation_first):
    torch.manual_seed(0)
    net = mfx.momentumize(build().train(not in_evaluation_first), gamma=0.5)
    for training in (not in_evaluation_first, False, True, False):
        for x in (X, 2 * X):
            found = net.train(training)(x)
            state = found if training else found[0]
            torch.testing.assert_close(state.double(), by_recurrence(net, x, 0.5), rtol=0, atol=1e-6)
    assert forward_of(net).table.pieces.graphs


@pytest.mark.parametrize("build", SERVED)
def test_at_gamma_zero_calls_and_gradients_are_the_models(build):
    torch.manual_seed(0)
    model = build()
    model.always = True
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for training in (True, False):
        results = [each.train(training)(X) for each in (model, net)]
        assert results[0][1] == results[1][1]
        assert torch.equal(results[0][0], results[1][0])
        for each, (state, _) in zip((model, net), results, strict=True):
            each.zero_grad()
            state.square().sum().backward()
        for ours, theirs in zip(net.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


class StepsInTheLoop(Model):
    """The loop uses the chain's modules once more."""

    def forward(self, x):
        for fc in self.fcs:
            x = x + torch.tanh(fc(x))
        found = []
        for _ in range(2 if self.training else x.shape[0] - 1):
            if not self.training:
                found.append(f"{sum(x[0].tolist()):.2f}")
            x = x.relu()  # so that each use is a chain of its own
            for fc in self.fcs:
                x = x + torch.tanh(fc(x))
        return x, found


class Block(nn.Module):
    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class KeptBlocks(Model):
    """A local variable holds the modules, and no sum stands in the loop."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, self.fcs))

    def forward(self, x):
        blocks = list(self.blocks)
        for block in blocks:
            x = block(x)
        found = []
        for _ in range(2 if self.training else x.shape[0] - 1):
            if not self.training:
                found.append(f"{sum(x[0].tolist()):.2f}")
            x = x.relu()
            for block in blocks:
                x = block(x)
        return x, found


@pytest.mark.parametrize("build", [StepsInTheLoop, KeptBlocks])
def test_steps_in_the_loop_itself_are_not_left_without_momentum(build):
    net = mfx.momentumize(build(), gamma=0.5)
    net(X)
    with pytest.raises(mfx.MfxError, match="other chains in one call than in another"):
        net.eval()(X)
