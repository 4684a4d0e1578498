"""Modules whose parameters wait for a first call: it draws them in the order in which the model does."""

import pytest
import torch
from torch import nn

import mfx


class Block(nn.Module):
    """A residual step."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.parts(x)


KINDS = {
    "linear": (lambda: (nn.LazyLinear(4), nn.Tanh()), 0),
    "two, dropout between them": (lambda: (nn.LazyLinear(5), nn.Dropout(0.5), nn.LazyLinear(4)), 0),
    "linear, norm": (lambda: (nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh()), 0),
    "convolution, norm": (lambda: (nn.LazyConv1d(4, 3, padding=1), nn.LazyBatchNorm1d()), 1),
    "convolution of images": (lambda: (nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d(), nn.Tanh()), 2),
    "transposed convolution": (
        lambda: (
            nn.LazyConvTranspose2d(4, 3, padding=1),
            nn.LazyInstanceNorm2d(affine=True, track_running_stats=True),
        ),
        2,
    ),
    "convolution of volumes": (lambda: (nn.LazyConv3d(4, 3, padding=1), nn.LazyBatchNorm3d()), 3),
}


def model_of(kind):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(*kind[0]()) for _ in range(3)))


def left_by(model, kind, first):
    """All that is to be seen of three calls, the first of them a training step or not."""
    generator, seen = torch.Generator().manual_seed(2), []
    torch.manual_seed(1)
    for i in range(3):
        x = torch.randn(3, 4, *(5,) * kind[1], generator=generator)
        model.train(i > 0 or first != "evaluation")
        with torch.set_grad_enabled(i > 0 or first != "without gradients"):
            y = model(x)
        if y.requires_grad:
            y.square().sum().backward()
        seen += [y.detach().clone(), torch.get_rng_state(), *(t.detach().clone() for t in model.state_dict().values())]
    return seen + [p.grad for p in model.parameters()]


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("first", ["training", "evaluation", "without gradients"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_at_gamma_zero_calls_are_those_of_the_model(kind, first, capture):
    net = mfx.momentumize(model_of(kind), gamma=0.0, capture=capture)
    found, expected = left_by(net, kind, first), left_by(model_of(kind), kind, first)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert any(graph.calls for graph in net.forward.table.graphs)


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_at_gamma_above_zero_parameters_and_generators_are_those_of_the_model(capture):
    model, x = model_of(KINDS["linear, norm"]), torch.randn(3, 4)
    net = mfx.momentumize(model_of(KINDS["linear, norm"]), gamma=0.9, capture=capture)
    left = []
    for each in (model, net):
        torch.manual_seed(1)
        each(x)
        left.append([torch.get_rng_state(), *each.parameters()])
    assert all(map(torch.equal, *left))
