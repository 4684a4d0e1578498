"""The predicted storage of streams, compared with the bytes kept."""

import json
import math

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

import mfx
from mfx.engine import streams_of
from mfx.engine.arithmetic.floating import predict
from mfx.net.forward import forward_of
from mfx.options.gamma import Gamma
from mfx.reports.explain.storage import explain_storage
from tests.mfx.models import Stack, inputs

WIDTH, BATCH = 16, 4096
UNIT = 4 * WIDTH * BATCH  # bytes of the stream in float32


class Line(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x):
        for fc in self.fcs:
            x = x + fc(x).tanh()
        return x


def storage_of(net, *args):
    (chain,) = mfx.explain(net, *args).chains
    return chain.storage


def storage_for(net, x):
    """The same without a prediction of all the rest."""
    (call,) = forward_of(net).active.calls.values()
    return explain_storage(call, tuple(streams_of([x], [step.writes for step in call.graphs.steps])))


CASES = {
    # depth, γ, arithmetic, dtype: the policy, and what is alive after the forward pass in bytes per element
    "states": (8, 0.9, "exact", torch.float32, "states", 17 + 4),  # X, V, top; and the output
    "inputs, as states take more": (3, 0.9, "exact", torch.float32, "inputs", (3 - 1) * 4 + 4),  # one is the caller's
    "bfloat16": (10, 0.9, "exact", torch.bfloat16, "inputs", (10 - 1) * 2 + 2),
    "bfloat16, deep": (16, 0.9, "exact", torch.bfloat16, "states", 17 + 2),
    "float": (15, 0.9, "float", torch.float32, "states", 4 + 4),  # the output is the state x
    "float, one anchor": (30, 0.9, "float", torch.float32, "states", (4 + 4) * 2),
    "gamma = 0": (8, 0.0, "exact", torch.float32, "inputs", (8 - 1) * 4 + 4),
}


@pytest.mark.parametrize("depth, gamma, arithmetic, dtype, policy, alive", CASES.values(), ids=CASES)
def test_against_what_is_alive(depth, gamma, arithmetic, dtype, policy, alive):
    torch.manual_seed(0)
    net = mfx.momentumize(Line(depth).to(dtype), gamma=gamma, arithmetic=arithmetic)
    x = torch.randn(BATCH, WIDTH).to(dtype)
    said = storage_for(net, x)
    assert said.policy == policy
    assert (said.shape, said.dtype) == ((BATCH, WIDTH), dtype)
    net(x).sum().backward()  # the first call also learns which buffers change
    with mfx.ActivationMeter(net.parameters()) as meter:
        out = net(x)
        live = meter.live
    assert live == pytest.approx(alive * BATCH * WIDTH, rel=0.01)
    # What explain says is the chain's share of it: without an output that is no state, with an input that is kept.
    shared = {"float": 0, "exact": dtype.itemsize}[arithmetic] - (dtype.itemsize if policy == "inputs" else 0)
    assert said.kept + shared * BATCH * WIDTH == pytest.approx(live, rel=0.01)
    assert out.requires_grad


def test_both_sides_are_given():
    said = storage_for(mfx.momentumize(Line(8)), torch.zeros(BATCH, WIDTH))
    assert (said.states, said.inputs, said.kept) == (17 * UNIT / 4, 8 * UNIT, 17 * UNIT / 4)
    assert said.reason == "integer states and a store of digits: 1.1 MiB; inputs of 8 steps: 2.0 MiB"
    said = storage_for(mfx.momentumize(Line(5)), torch.zeros(BATCH, WIDTH))
    # A choice between functions, not of the smallest: the store counts with all of its eight bytes.
    assert (said.states, said.inputs, said.kept) == (17 * UNIT / 4, 5 * UNIT, 5 * UNIT)


@pytest.mark.parametrize("gamma", [1 / 64, 0.1, 0.9])
def test_the_store_of_digits_counts(gamma):
    said = storage_for(mfx.momentumize(Line(200), gamma=gamma), torch.zeros(1, WIDTH))
    bits = 200 * math.log2(1 / gamma)  # what reversal cannot do without, beside two states of 64 bits
    assert 16 * WIDTH + bits / 8 * WIDTH <= said.states <= 24 * WIDTH + 1.05 * bits / 8 * WIDTH + 4 * WIDTH


@pytest.mark.parametrize("depth", [4, 25, 26, 40, 80, 300])
def test_float_arithmetic_predicts_its_error_and_counts_its_anchors(depth):
    # The tolerance of 6e-6 allows 25 steps back at γ = 0.9: an anchor every 25 steps, none after the last.
    said = storage_for(mfx.momentumize(Line(depth), arithmetic="float"), torch.zeros(1, WIDTH))
    assert said.anchors == (depth - 1) // 25
    assert said.error == predict(Gamma(9, 10), torch.float32, min(depth, 25)).error
    assert said.error < 6e-6
    assert storage_for(mfx.momentumize(Line(depth)), torch.zeros(1, WIDTH)).error == 0.0


def test_the_predicted_error_is_what_rebuilding_makes():
    torch.manual_seed(0)
    model, x = Line(15), torch.randn(64, WIDTH)
    seen = []
    model.fcs[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    net = mfx.momentumize(model, arithmetic="float")
    net(x).sum().backward()
    first, rebuilt = seen
    error = ((rebuilt - first).abs().max() / first.abs().max()).item()
    assert 0 < error < storage_of(net).error


def test_without_inputs_the_last_call_counts():
    net = mfx.momentumize(Line(8))
    assert storage_of(net) is None
    assert "kept between" not in str(mfx.explain(net))
    net(torch.zeros(3, WIDTH))
    assert storage_of(net).shape == (3, WIDTH)
    assert storage_of(net, torch.zeros(5, WIDTH)).shape == (5, WIDTH)
    assert storage_of(Line(8), torch.zeros(5, WIDTH)).shape == (5, WIDTH)  # a model that was never momentumized
    module = mfx.momentumize(mfx.trace(Line(8)))
    module(torch.zeros(3, WIDTH))
    assert storage_of(module).shape == (3, WIDTH)


def test_it_follows_gamma():
    net, x = mfx.momentumize(Line(8)), torch.zeros(1, WIDTH)
    mfx.set_gamma(net, 0.0)
    said = storage_of(net, x)
    assert (said.policy, said.states) == ("inputs", None)
    assert said.reason.startswith("gamma = 0")
    mfx.set_gamma(net, 0.5)
    assert storage_of(net, x).policy == "states"


def test_a_budget_of_one():
    said = storage_for(mfx.momentumize(Line(8), memory_budget=1.0), torch.zeros(1, WIDTH))
    assert (said.policy, said.kept) == ("activations", None)


@pytest.mark.parametrize("gamma, arithmetic", [(0.9, "exact"), (0.9, "float"), (0.0, "exact")])
def test_text_and_data(gamma, arithmetic):
    net = mfx.momentumize(Stack(depth=14), gamma=gamma, arithmetic=arithmetic)
    explanation = mfx.explain(net, inputs())
    (chain,) = explanation.chains
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 100
    assert f"blocks: {chain.storage.policy}" in text
    (data,) = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))["chains"]
    assert data["storage"]["policy"] == chain.storage.policy
    assert data["storage"]["shape"] == [2, 8]
    assert data["storage"]["kept"] == chain.storage.kept
    assert len(data["weights"]) == 28


def test_real_models():
    x = torch.randn(2, 3, 32, 32)
    (chain,) = mfx.explain(resnet18(), x).chains
    assert (chain.name, chain.storage.shape, chain.storage.policy) == ("layer1", (2, 64, 8, 8), "inputs")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4)
    (chain,) = mfx.explain(vit, x).chains
    assert (chain.storage.shape, chain.storage.policy) == ((2, 5, 192), "states")  # four patches and the class token
    assert chain.storage.kept == 17 * 2 * 5 * 192
    (half,) = mfx.explain(vit.bfloat16(), x.bfloat16()).chains
    assert half.storage.dtype == torch.bfloat16
