"""The prediction of a training step, compared with a training step."""

import html
import json
import logging
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import mfx
from examples.benchmarks.nets import unet
from mfx.reports.explain.tables import memory_table
from mfx.text import size
from mfx_passes.ir import block_of
from tests.mfx.models import ConvNet, Stack, images, inputs
from tests.mfx.net.test_submodules import Branching
from tests.sampling import sampled

# A second run that is compared with the first leaves a checksum of eight bytes per step, and per block in no chain,
# which is not formed of tensors without values. All else is the same storages, but for what a first run holds until it
# has formed its checksum: the statistics of a LayerNorm, 80 bytes in "ViT, half", whose peak is in the forward pass.
CHECKSUM = 8

IDS = torch.arange(4 * 24).view(4, 24) % 50


def narrow_resnet():
    return ResNet(BasicBlock, [3, 1, 1, 1], num_classes=10), (torch.randn(2, 3, 32, 32),), {}


def vit():
    return VisionTransformer(16, 8, 4, 2, 16, 32, num_classes=10), (torch.randn(2, 3, 16, 16),), {}


def bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        attn_implementation="eager",
    )
    return BertModel(config), (IDS,), {}


def gpt2(**more):
    config = GPT2Config(
        vocab_size=50,
        n_positions=24,
        n_embd=16,
        n_layer=4,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
        **more,
    )
    return GPT2LMHeadModel(config), (), {"input_ids": IDS, "labels": IDS}


def dropout():
    return Stack(depth=6, dropout=0.5, functional=0.1), (inputs(64),), {}


class Scaled(nn.Module):
    """x + tanh(w x): a branch that takes little beside the state."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x + torch.tanh(self.weight * x)


def large():
    """Four blocks of a CPU's kernels to each state."""
    return nn.Sequential(*(Scaled(64) for _ in range(12))), (torch.randn(4096, 64),), {}


def nested():
    return unet(4, 4, added=True), (torch.randn(2, 3, 16, 16),), {}


def joined():
    return unet(4, 2, added=False), (torch.randn(2, 3, 16, 16),), {}


FLOAT, UNCHANGED, ALL = {"arithmetic": "float"}, {"gamma": 0.0}, {"memory_budget": 1.0}
CASES = {
    "ResNet": (narrow_resnet, {}),
    "ResNet, float": (narrow_resnet, FLOAT),
    "ResNet, gamma=0": (narrow_resnet, UNCHANGED),
    "ViT": (vit, {}),
    "ViT, budget": (vit, ALL),
    "ViT, half": (vit, {"memory_budget": 0.5, "verify": "off"}),
    "ResNet, bytes, float": (narrow_resnet, {"memory_budget": "750KiB", **FLOAT}),
    "ViT, all that lies between": (vit, {"memory_budget": 0.25, "recompute": "all"}),
    "U-Net, added skips": (nested, {}),
    "U-Net, added skips, all that lies between": (nested, {"recompute": "all"}),
    "U-Net, added skips, half, float": (nested, {"memory_budget": 0.5, **FLOAT}),
    "U-Net, joined skips": (joined, {}),
    "large": (large, {}),
    "large, half": (large, {"memory_budget": 0.5}),
    "large, budget": (large, ALL),
    "BERT": (bert, {}),
    "dropout": (dropout, {}),
    "dropout, float": (dropout, FLOAT),
}


def main_result(output):
    """Return the tensor that explain starts the backward pass at."""
    if not isinstance(output, dict):
        return output
    return output["loss"] if output.get("loss") is not None else next(iter(output.values()))


def measured(net, args, kwargs, before=1):
    """Bytes kept, and the peaks with the output held and with the loss alone, of training steps behind some others."""
    peaks = []
    for is_held in (*[False] * before, True, False):
        net.zero_grad()
        with mfx.ActivationMeter(net.parameters()) as meter:
            output = net(*args, **kwargs)
            kept = meter.live
            result = main_result(output)
            if not is_held:
                del output
            result.backward(torch.ones_like(result))
        peaks.append(meter.peak)
    return kept, *peaks[before:]


def check(explanation, model, net, args, kwargs, before=1):
    plain, momentum = explanation.estimate.plain, explanation.estimate.momentum
    assert (plain.kept, plain.peak, plain.peak_of_loss) == measured(model, args, kwargs)
    kept, peak, peak_of_loss = measured(net, args, kwargs, before)
    blocks = sum(block_of(node) is not None for node in next(iter(mfx.graphs(net).values())).graph.nodes)
    checksums = CHECKSUM * (blocks + sum(len(chain.steps) for chain in explanation.chains))
    assert 0 <= kept - momentum.kept <= checksums < 0.05 * kept
    assert 0 <= peak - momentum.peak <= checksums
    assert 0 <= peak_of_loss - momentum.peak_of_loss <= checksums


@sampled("build, options", CASES, 9)
def test_memory_is_what_is_measured(build, options):
    torch.manual_seed(0)
    model, args, kwargs = build()
    net = mfx.momentumize(model, **options)
    before = 7 if isinstance(options.get("memory_budget"), str) else 1  # the plan of a number of bytes grows
    check(mfx.explain(net, *args, **kwargs), model, net, args, kwargs, before)


@pytest.fixture(scope="module")
def without_cache():
    """A language model's explanation, on the meta device."""
    with torch.device("meta"):
        model, _, _ = gpt2(use_cache=False)
    ids = IDS.to("meta")
    return mfx.explain(model, input_ids=ids, labels=ids)


def test_a_language_models_memory_is_predicted_on_the_meta_device(without_cache):
    torch.manual_seed(0)
    model, args, kwargs = gpt2(use_cache=False)
    check(without_cache, model, mfx.momentumize(model), args, kwargs)
    usage, logits = without_cache.estimate.momentum, 4 * IDS.numel() * 50
    assert usage.peak_of_loss == usage.peak - logits
    assert re.search("peak, only the loss held +[0-9.]+ KiB", str(without_cache))
    assert without_cache.estimate.held == {}


def test_a_cache_that_escapes(without_cache):
    model, args, kwargs = gpt2()
    explanation = mfx.explain(model, *args, **kwargs)
    cache = 2 * 4 * IDS.numel() * 16 * 4  # keys and values; layers, tokens, width, bytes
    (key,) = {"cache", "past_key_values"} & set(model(**kwargs))  # the name changed in transformers 5.24
    assert explanation.estimate.held == {key: cache}
    plain, momentum = explanation.estimate.plain, explanation.estimate.momentum
    assert (momentum.peak, momentum.peak_of_loss) == measured(mfx.momentumize(model), args, kwargs)[1:]
    # Without the cache the plain peak is in the forward pass, where the model's own code holds the labels that it
    # shifted, 25 of 8 bytes a sequence, to the end of the loss.
    peak, peak_of_loss = measured(model, args, kwargs)[1:]
    assert (plain.peak, plain.peak_of_loss) == (peak, peak_of_loss - 4 * 25 * 8)
    assert explanation.advice[-1].startswith(f"the output's {key} escapes the chains: ")
    assert explanation.advice[-1].endswith(f"pass use_cache=False to save another {cache / 1024:.1f} KiB")
    assert explanation.chains[0].memory.kept == without_cache.chains[0].memory.kept + cache


def operations(net, x):
    net(x)  # the first call also learns which buffers change
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize(
    "build, x",
    [(lambda: narrow_resnet()[0], torch.zeros(2, 3, 32, 32)), (lambda: Stack(depth=4), inputs(16))],
    ids=["ResNet", "linear"],
)
def test_operations_are_what_is_counted(build, x, gamma):
    net = mfx.momentumize(build(), gamma=gamma)
    explanation = mfx.explain(net, x)
    plain, momentum = explanation.estimate.plain, explanation.estimate.momentum
    with mfx.original(net):
        assert plain.flops == operations(net, x)
    assert momentum.flops == operations(net, x)
    again, more = sum(chain.memory.recomputed for chain in explanation.chains), momentum.recomputed[""]
    assert again + more == momentum.flops - plain.flops > 0
    assert bool(more) == isinstance(net, ResNet)  # whose blocks with projections are in no chain


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_on_a_cpu_is_counted():
    batch, tokens, width = 2, 5, 16
    linear = 4 * 2 * batch * tokens * width * width
    attention = 2 * 2 * batch * tokens * tokens * width
    x = torch.zeros(batch, tokens, width, requires_grad=True)
    # Backward of a linear layer takes two products of the forward's size; of attention, five where the forward has two.
    assert mfx.explain(Attention(), x).estimate.plain.flops == 3 * linear + attention + 5 * attention // 2


def test_a_chains_share():
    """Of a model that is nothing but a chain, everything but the chain's input is the chain's."""
    model = nn.Sequential(*(Stack().blocks[0] for _ in range(3)))
    x = inputs(256, requires_grad=True)
    for options in ({}, FLOAT, UNCHANGED, ALL):
        explanation = mfx.explain(mfx.momentumize(model, **options), x)
        (chain,) = explanation.chains
        assert chain.memory.plain == explanation.estimate.plain.kept
        assert chain.memory.kept == explanation.estimate.momentum.kept


def test_meta_models_are_predicted_alike():
    x = torch.zeros(2, 3, 32, 32)
    with torch.device("meta"):
        model, _, _ = narrow_resnet()
    predicted = mfx.explain(model, x.to("meta"))
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())
    assert predicted.to_dict()["totals"] == mfx.explain(narrow_resnet()[0], x).to_dict()["totals"]


class Choosy(nn.Module):
    """Reads as many elements as are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x):
        return self.stack(x).flatten() @ self.stack(x[x > 0].mean() + x).flatten()


def test_what_cannot_be_predicted_is_said():
    explanation = mfx.explain(Choosy(), inputs())
    assert explanation.estimate is None
    assert "DynamicOutputShapeException" in explanation.unpredicted
    assert "memory could not be predicted: Dynamic" in str(explanation)
    assert "memory could not be predicted: Dynamic" in explanation._repr_html_()
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["totals"] is None
    assert data["unpredicted"] == explanation.unpredicted


def test_without_inputs_nothing_is_predicted():
    explanation = mfx.explain(Stack())
    assert (explanation.estimate, explanation.unpredicted) == (None, "")
    assert explanation.chains[0].memory is None


def test_a_graph_module():
    model, x = Stack(depth=4), inputs(128)
    totals = mfx.explain(model, x).to_dict()["totals"]
    rewritten = mfx.momentumize(mfx.trace(model))
    assert mfx.explain(rewritten, x).to_dict()["totals"] == totals


def test_a_rehearsal_leaves_no_trace():
    net, x = mfx.momentumize(ConvNet(depth=8)), images()
    net(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    calls = [call for call in net.modules() if type(call).__name__ == "Momentum"]
    mfx.explain(net, images(5))
    torch.testing.assert_close([p.grad for p in net.parameters()], gradients, rtol=0, atol=0)
    torch.testing.assert_close(dict(net.state_dict()), state, rtol=0, atol=0)
    assert all(type(call).__name__ != "Rehearsed" for call in net.modules())
    assert calls == [call for call in net.modules() if type(call).__name__ == "Momentum"]
    net.zero_grad()
    net.load_state_dict(state)


def test_frozen_models_have_no_backward_pass():
    model = Stack().requires_grad_(False)
    explanation = mfx.explain(model, inputs())
    assert explanation.estimate.plain.kept == explanation.estimate.momentum.kept
    assert explanation.chains[0].memory.recomputed == 0


def test_models_in_parts_are_not_predicted():
    net, x = mfx.momentumize(Branching()), torch.randn(2, 4)
    with pytest.warns(UserWarning, match="cannot be captured as one graph"):
        net(x)
    explanation = mfx.explain(net, x)
    assert explanation.estimate is None
    assert "memory could not be predicted: the model cannot be captured as one graph" in str(explanation)


def test_a_notebook_shows_what_a_terminal_does():
    explanation = mfx.explain(Stack(depth=2), inputs())
    page, text = explanation._repr_html_(), str(explanation)
    for row in memory_table(explanation.chains, explanation.estimate).rows:
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
        assert all(cell in text for cell in row)
    assert all(html.escape(advice) in page for advice in explanation.advice)


@pytest.mark.parametrize(
    "options", [{}, {"arithmetic": "float"}, {"use_backprop": True}, {"is_residual": False}], ids=str
)
def test_a_momentum_nets_memory_by_itself_and_in_a_model(options):
    """Plain training is that of the residual network; a model that contains the net is left as it is."""
    torch.manual_seed(0)
    functions = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(8)]
    net, x = mfx.MomentumNet(functions, **{"use_backprop": False, **options}), torch.randn(64, 8)
    alone = mfx.explain(net, x=x)
    plain = mfx.MomentumNet(functions, 0.0, is_residual=net.is_residual)
    plain_usage = alone.estimate.plain
    assert (plain_usage.kept, plain_usage.peak, plain_usage.peak_of_loss) == measured(plain, (x,), {})
    inside = mfx.explain(nn.Sequential(net), x)
    for explanation in (alone, inside):
        kept, peak, _ = measured(net, (x,), {})
        assert 0 <= kept - explanation.estimate.momentum.kept <= CHECKSUM * len(functions) < 0.05 * kept
        assert 0 <= peak - explanation.estimate.momentum.peak <= CHECKSUM * len(functions)
    assert inside.chains == ()
    with pytest.raises(mfx.MfxError, match="floating-point tensor x, not on a NoneType"):
        mfx.explain(net, None)


def test_what_fails_without_values_is_said_once(caplog):
    log = logging.getLogger("torch._subclasses.fake_tensor")  # which hands nothing on to the root
    log.addHandler(caplog.handler)
    try:
        explanation = mfx.explain(Stack(), torch.randn(2, 3))
    finally:
        log.removeHandler(caplog.handler)
    assert explanation.unpredicted.startswith("RuntimeError: ")
    assert f"memory could not be predicted: {explanation.unpredicted}"[:60] in str(explanation)
    assert not caplog.records


def test_what_else_needs_room_is_added_up():
    model, args, _ = narrow_resnet()
    model.fc.requires_grad_(False)
    explanation = mfx.explain(mfx.momentumize(model), *args)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    frozen = sum(t.numel() * t.element_size() for t in (*model.fc.parameters(), *model.buffers()))
    assert explanation.to_dict()["room"] == {
        "parameters": trained + frozen,
        "gradients": trained,
        "optimizer": 2 * trained,
        "gathered": 0,
    }
    *_, beside, whole = memory_table(explanation.chains, explanation.estimate).rows
    room, peak = 4 * trained + frozen, explanation.estimate.momentum.peak
    assert beside[2] == size(room)
    assert whole[2] == size(room + peak)
