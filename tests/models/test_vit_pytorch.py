"""The zoo of vit_pytorch: einops everywhere, attention written out, another kind of residual in every other file."""

from importlib import import_module

import pytest
import torch

import mfx
from tests.models.judge import Case, judge, judged
from tests.sampling import sampled

VIT = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 3, "heads": 2, "mlp_dim": 64}
IMAGES = [(8, 3, 32, 32)]
LARGER = [(4, 3, 64, 64)]
VIDEO = [(4, 3, 4, 32, 32)]


def options(base=VIT, *, without=(), **more):
    return {**{key: value for key, value in base.items() if key not in without}, **more}


def case(path, kw, shapes, chains, rejected=0, **more):
    """``path`` is module.Class."""
    return Case(path, lambda: build(path, kw), shapes, chains, rejected, **more)


def build(path, kw):
    module, name = path.split(".")
    return getattr(import_module(f"vit_pytorch.{module}"), name)(**kw)


VIDEO_KW = options(without=["patch_size"], image_patch_size=8, frames=4, frame_patch_size=2)
STAGES = {"s1_emb_dim": 16, "s2_emb_dim": 24, "s3_emb_dim": 32, "num_classes": 10}

CASES = [
    case("vit.ViT", options(dropout=0.1, emb_dropout=0.1), IMAGES, [6]),
    case("simple_vit.SimpleViT", options(), IMAGES, [6]),
    case("cait.CaiT", options(cls_depth=2, dropout=0.1, emb_dropout=0.1), IMAGES, [4, 6]),
    case("deepvit.DeepViT", options(dropout=0.1, emb_dropout=0.1), IMAGES, [6]),
]

ZOO = [
    case("simple_vit_with_qk_norm.SimpleViT", options(), IMAGES, [6]),
    case("simple_vit_with_register_tokens.SimpleViT", options(), IMAGES, [6]),
    case("simple_vit_with_value_residual.SimpleViT", options(), IMAGES, None),
    case("simple_vit_with_fft.SimpleViT", options(freq_patch_size=8), IMAGES, [6]),
    case("simple_vit_1d.SimpleViT", options(without=["image_size"], seq_len=32), [(8, 3, 32)], [6]),
    case("simple_vit_3d.SimpleViT", VIDEO_KW, VIDEO, [6]),
    case("simple_uvit.SimpleUViT", options(), IMAGES, None, saves=False),
    case("vit_1d.ViT", options(without=["image_size"], seq_len=32), [(8, 3, 32)], [6]),
    case("vit_3d.ViT", VIDEO_KW, VIDEO, [6]),
    case("vit_detpool.ViTDetPool", options(), IMAGES, [6]),
    case("vit_for_small_dataset.ViT", options(), IMAGES, [6]),
    case("vit_with_decorr.ViT", options(), IMAGES, [6]),
    case("vit_with_patch_merger.ViT", options(depth=6), IMAGES, None),
    case("parallel_vit.ViT", options(), IMAGES, [6]),
    case("learnable_memory_vit.ViT", options(), IMAGES, [6]),
    case("mp3.ViT", options(), IMAGES, [6]),
    case("looped_vit.LoopedViT", options(without=["depth"], **dict.fromkeys(
        ["pre_loop_depth", "num_looped_blocks", "post_loop_depth", "loop_depth"], 2)), IMAGES, None),
    case("distill.DistillableViT", options(), IMAGES, [6]),
    case("xcit.XCiT", options(cls_depth=2), IMAGES, [4, 9]),
    case("levit.LeViT", {"image_size": 64, "num_classes": 10, "dim": (32, 48, 64), "depth": 2, "heads": (2, 3, 4),
                         "mlp_mult": 2}, LARGER, [5, 5, 4]),
    case("cvt.CvT", {**STAGES, "s3_depth": 3}, LARGER, [2, 4, 6]),
    case("nest.NesT", {"image_size": 32, "patch_size": 4, "dim": 16, "heads": 2, "num_hierarchies": 2,
                       "block_repeats": (2, 2), "num_classes": 10}, IMAGES, [4, 4]),
    case("max_vit.MaxViT", {"num_classes": 10, "dim": 16, "depth": (2, 2), "dim_head": 8, "window_size": 4}, LARGER,
         None),
    case("mobile_vit.MobileViT", {"image_size": (64, 64), "dims": [32, 40, 48], "num_classes": 10,
                                  "channels": [16, 16, 24, 24, 32, 32, 40, 40, 48, 48, 64]}, LARGER, None),
    case("vivit.ViViT", options(without=["depth", "patch_size"], image_patch_size=8, frames=4, frame_patch_size=2,
                                spatial_depth=2, temporal_depth=2), VIDEO, [4, 4]),
]  # fmt: skip


@judged(CASES, zoo=ZOO, sample=2)
def test_vit_pytorch(case, verdict):
    judge(case, verdict)


# What Python tracing cannot follow: conversions of a size to int, lengths, branches upon sizes, wrapped functions.
UNTRACEABLE = {
    "ats_vit.ViT": (options(max_tokens_per_depth=(16, 12, 8)), "control flow"),
    "cct.CCT": ({"img_size": 32, "embedding_dim": 32, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2}, "iterated"),
    "local_vit.LocalViT": (options(), "int()"),
    "rvt.RvT": (options(), "int()"),
    "simple_vit_with_specialized_cls.SimpleViT": (options(), "length of a traced value"),
    "vit_5.ViT": (options(), "int()"),
    "vit_with_patch_dropout.ViT": (options(), "int()"),
}


@pytest.mark.parametrize("path", UNTRACEABLE)
def test_what_cannot_be_traced_says_where(path):
    kw, reason = UNTRACEABLE[path]
    with pytest.raises(mfx.MfxError, match=rf"cannot be traced symbolically: .*{reason}(.|\n)*vit_pytorch/\w+.py:\d+"):
        mfx.momentumize(build(path, kw), capture="symbolic")


BY_DYNAMO = {
    "cct.CCT": [2, 2, 2],
    "rvt.RvT": [2, 4],
    "simple_vit_with_specialized_cls.SimpleViT": [6],
    "vit_5.ViT": [6],
    "vit_with_patch_dropout.ViT": [6],
}


@sampled("path", list(BY_DYNAMO), 2)
def test_what_cannot_be_traced_is_captured_at_the_first_call(path):
    model = build(path, UNTRACEABLE[path][0])
    net = mfx.momentumize(model, gamma=0.0)
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for function in (net, model):
        torch.manual_seed(1)
        outputs.append(function(x))
    assert torch.equal(*outputs)
    assert sorted(len(chain.steps) for chain in mfx.explain(net).chains) == BY_DYNAMO[path]
