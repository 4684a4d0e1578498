"""nn.Transformer, and one model captured both ways: the same chains under the same names, the same output."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18

import mfx
from tests.models.step import assert_bit_equal, deterministic, loss_of, tensors_in
from tests.models.test_huggingface import train
from tests.sampling import grid, sampled

DEPTH = 2
LAYER, CROSS = 2 * DEPTH, 3 * DEPTH


def transformer(norm_first):
    torch.manual_seed(0)
    return nn.Transformer(32, 4, DEPTH, DEPTH, 64, batch_first=True, norm_first=norm_first)


def sentences(**more):
    torch.manual_seed(1)
    return {"src": torch.randn(2, 7, 32), "tgt": torch.randn(2, 5, 32), **more}


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
CALLS = {
    "plain": {},
    "mask": {"tgt_mask": CAUSAL},
    "causal": {"tgt_mask": CAUSAL, "tgt_is_causal": True},
    "padding": {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING},
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # of norm_first, from the constructor
@grid(2, call=CALLS, norm_first={"pre_norm": True, "post_norm": False}, training={"train": True, "eval": False})
def test_transformer(norm_first, call, training):
    model = transformer(norm_first).train(training)
    inputs = sentences(**call)
    net = mfx.momentumize(model, verify="raise")
    assert_bit_equal(train(net, inputs), train(mfx.momentumize(model, memory_budget=1.0), inputs))
    found = {chain.name: len(chain.steps) for chain in mfx.explain(net, **inputs).chains}
    assert found == {"encoder.layers": LAYER, "decoder.layers": CROSS}
    assert_bit_equal(train(mfx.momentumize(model, gamma=0.0), inputs), train(model, inputs))


class HandWritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


IMAGE = (2, 3, 32, 32)
BOTH = {
    "vit_b_16": (lambda: VisionTransformer(32, 8, DEPTH, 4, 64, 128, 0.1, 0.1, num_classes=10), IMAGE),
    "resnet18": (lambda: resnet18(num_classes=10), IMAGE),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=DEPTH, embed_dim=48), IMAGE),
    "hand_written": (HandWritten, (2, 8)),
}


@sampled("make, shape", BOTH, 1)
def test_both_ways_of_capturing(make, shape):
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(shape)
    found, outputs = [], []
    for capture in ("symbolic", "dynamo"):
        net = mfx.momentumize(model, capture=capture, verify="raise")
        state = {key: value.clone() for key, value in model.state_dict().items()}
        torch.manual_seed(2)
        with deterministic():
            y = net(x)
            loss_of(tensors_in(y)).backward()
        grads = [p.grad for p in model.parameters()]
        model.zero_grad()
        model.load_state_dict(state)
        found.append({chain.name: len(chain.steps) for chain in mfx.explain(net, x).chains})
        outputs.append([y.detach(), *grads])
    assert found[0] == found[1] != {}
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
