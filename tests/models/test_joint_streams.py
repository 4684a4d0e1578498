"""Models of libraries whose streams read each other: every residual add of their blocks is in a chain."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mfx
from tests.sampling import sampled

Made = tuple[nn.Module, dict[str, Any]]
# What norms, gates and positions add, and masks that scores are added to, are no streams.
NO_STREAM = re.compile("both sides of the sum are computed|scaled, gated or subtracted|changes the stream from")


def of_library(name: str, model: str) -> Any:
    """A class of a library that may not be installed."""
    return getattr(pytest.importorskip(name), model)


def _image(**sizes: int) -> dict[str, Any]:
    return {"pooled_projections": torch.randn(2, 10), "encoder_hidden_states": torch.randn(2, 5, 12), **sizes}


def sd3() -> Made:
    make = of_library("diffusers", "SD3Transformer2DModel")
    model = make(
        sample_size=4, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=4,
    )  # fmt: skip
    return model, _image(hidden_states=torch.randn(2, 4, 4, 4), timestep=torch.tensor([3, 7]), return_dict=False)


def flux() -> Made:
    make = of_library("diffusers", "FluxTransformer2DModel")
    model = make(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    positions = {"img_ids": torch.randn(6, 3), "txt_ids": torch.zeros(5, 3)}
    return model, _image(
        hidden_states=torch.randn(2, 6, 4), timestep=torch.tensor([0.3, 0.7]), return_dict=False, **positions
    )


def lxmert() -> Made:
    config = importlib.import_module("transformers").LxmertConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24, l_layers=1, x_layers=2, r_layers=1,
        max_position_embeddings=16, visual_feat_dim=12,
    )  # fmt: skip
    words, objects = torch.randint(0, 50, (2, 6)), torch.rand(2, 4, 16)
    inputs = {"input_ids": words, "visual_feats": objects[..., :12], "visual_pos": objects[..., 12:]}
    return importlib.import_module("transformers").LxmertModel(config), {**inputs, "return_dict": False}


# Joint steps and updates of each chain. A step of SD3 and Flux is both streams' attention, or one stream's MLP; the
# last text stream of SD3 ends in an attention. LXMERT: 2 and 2 of its towers; by block both cross attentions, which
# read the old states, 2 self attentions and 2 MLPs.
CASES: dict[str, tuple[Callable[[], Made], list[tuple[int, int]]]] = {
    "sd3": (sd3, [(8, 10)]),
    "flux": (flux, [(2, 2), (6, 8)]),
    "lxmert": (lxmert, [(14, 16)]),
}


def outcome(net: nn.Module, inputs: dict[str, Any]) -> list[Tensor | None]:
    torch.manual_seed(2)
    outputs = [t for t in pytree.tree_leaves(net(**inputs)) if isinstance(t, Tensor) and t.requires_grad]
    net.zero_grad()
    torch.stack([(i + 0.5) * y.square().sum() for i, y in enumerate(outputs)]).sum().backward()
    return [*outputs, *(p.grad for p in net.parameters())]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)


@sampled("name", list(CASES), 1)
def test_every_update_is_in_a_chain(name: str) -> None:
    make, expected = CASES[name]
    torch.manual_seed(0)
    model, inputs = make()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    net = mfx.momentumize(model, gamma=0.9, verify="raise")
    found = outcome(net, inputs)
    explained = mfx.explain(net)
    assert sorted((len(chain.steps), len(chain.updates)) for chain in explained.chains) == expected
    assert not [str(left) for left in explained.rejections if not NO_STREAM.search(left.reason)]
    assert same(found, outcome(mfx.momentumize(model, gamma=0.9, memory_budget=1.0), inputs))
    plain = outcome(model, inputs)
    assert same(outcome(mfx.momentumize(model, gamma=0.0), inputs), plain)
    assert not same(found, plain)
