"""Numbers read off tensors, in whatever TorchDynamo makes of them: at γ = 0 the net is the model."""

import json
import struct
import warnings
from decimal import Decimal

import pytest
import torch
from torch import nn

import mfx
from mfx.capture.captured import CaptureError

USES = {
    "a format": lambda x: x / float(f"{x.abs().max().item():.6f}"),
    "a format in a loop": lambda x: _halved(x),
    "packed": lambda x: x * struct.unpack("f", struct.pack("f", x.sum().item()))[0],
    "a decimal": lambda x: x * float(Decimal(str(x.sum().item()))),
    "a key": lambda x: x * sum({x.sum().item(): 1}.values()),
    "sorted": lambda x: x * sorted([x.sum().item(), 2.0, -1.0])[1],
    "as text": lambda x: x * json.loads(json.dumps([x.sum().item()]))[0],
    "an index": lambda x: x * [1.0, 2.0, 3.0][int(x.sum().item()) % 3],
}


def _halved(x):
    while float(f"{x.abs().max().item():.6f}") > 0.1:
        x = x / 2
    return x


class Net(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.use = use

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.use(x)


@pytest.mark.parametrize("route", ["auto", "dynamo"])
@pytest.mark.parametrize("use", USES)
def test_a_number_read_off_a_tensor(use, route):
    torch.manual_seed(0)
    model = Net(USES[use])
    net = mfx.momentumize(model, gamma=0.0, capture=route)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is no one graph
        for _ in range(2):
            x = torch.randn(2, 4)
            expected, found = model(x), net(x)
            assert torch.equal(found, expected)
            model.zero_grad()
            expected.sum().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            found.sum().backward()
            assert all(map(torch.equal, gradients, [p.grad for p in net.parameters()]))


@pytest.mark.parametrize("use", ["a format", "a format in a loop", "packed"])
def test_what_dynamo_runs_into_is_a_capture_error_where_a_graph_is_asked_for(use):
    net = mfx.momentumize(Net(USES[use]), gamma=0.9, capture="dynamo")
    with pytest.raises(CaptureError, match="cannot be captured as one graph"):
        net(torch.randn(2, 4))
