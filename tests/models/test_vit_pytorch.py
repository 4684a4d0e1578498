"""The zoo of vit_pytorch: einops everywhere, attention written out, another kind of residual in every other file."""

import pytest
import torch

import mfx
from tests.models.judge import Case, judge, judged
from tests.models.vit_pytorch import OPTIONS, VIT, build
from tests.sampling import sampled

IMAGES = [(8, 3, 32, 32)]
LARGER = [(4, 3, 64, 64)]
VIDEO = [(4, 3, 4, 32, 32)]
SERIES = [(8, 3, 32)]


def case(path, shapes, chains, rejected=0, *, options=None, **more):
    """``path`` is module.Class; options beside its own."""
    return Case(path, lambda: build(path, {**OPTIONS[path], **(options or {})}), shapes, chains, rejected, **more)


# Layers that are dropped at random are in no graph.
ALL_LAYERS = {"layer_dropout": 0.0}

CASES = [
    case("vit.ViT", IMAGES, [6]),
    case("simple_vit.SimpleViT", IMAGES, [6]),
    case("cait.CaiT", IMAGES, [4, 6], options=ALL_LAYERS),
    case("deepvit.DeepViT", IMAGES, [6]),
]

ZOO = [
    case("simple_vit_with_qk_norm.SimpleViT", IMAGES, [6]),
    case("simple_vit_with_register_tokens.SimpleViT", IMAGES, [6]),
    case("simple_vit_with_value_residual.SimpleViT", IMAGES, None),
    case("simple_vit_with_fft.SimpleViT", IMAGES, [6]),
    case("simple_vit_1d.SimpleViT", SERIES, [6]),
    case("simple_vit_3d.SimpleViT", VIDEO, [6]),
    case("simple_uvit.SimpleUViT", IMAGES, None, saves=False),
    case("vit_1d.ViT", SERIES, [6]),
    case("vit_3d.ViT", VIDEO, [6]),
    case("vit_detpool.ViTDetPool", IMAGES, [6]),
    case("vit_for_small_dataset.ViT", IMAGES, [6]),
    case("vit_with_decorr.ViT", IMAGES, [6]),
    case("vit_with_patch_merger.ViT", IMAGES, None),
    case("parallel_vit.ViT", IMAGES, [6]),
    case("learnable_memory_vit.ViT", IMAGES, [6]),
    case("mp3.ViT", IMAGES, [6]),
    case("looped_vit.LoopedViT", IMAGES, None),
    case("distill.DistillableViT", IMAGES, [6]),
    case("xcit.XCiT", IMAGES, [4, 9], options=ALL_LAYERS),
    case("levit.LeViT", LARGER, [5, 5, 4]),
    case("cvt.CvT", LARGER, [2, 4, 6]),
    case("nest.NesT", IMAGES, [4, 4]),
    case("max_vit.MaxViT", LARGER, None),
    case("mobile_vit.MobileViT", LARGER, None),
    case("vivit.ViViT", VIDEO, [4, 4]),
    case("simple_vit_with_specialized_cls.SimpleViT", IMAGES, [6]),
]


@judged(CASES, zoo=ZOO, sample=2)
def test_vit_pytorch(case, verdict):
    judge(case, verdict)


# What Python tracing cannot follow: conversions of a size to int, branches upon sizes, modes.
UNTRACEABLE = {
    "ats_vit.ViT": "control flow",
    "cct.CCT": "iterated",
    "local_vit.LocalViT": "needed as a number",
    "rvt.RvT": "computed in autocast",
    "vit_5.ViT": "computed in autocast",
    "vit_with_patch_dropout.ViT": "needed as a number",
}


@pytest.mark.parametrize("path", UNTRACEABLE)
def test_what_cannot_be_traced_says_where(path):
    model, reason = build(path, OPTIONS.get(path, VIT)), UNTRACEABLE[path]
    with pytest.raises(mfx.MfxError, match=rf"cannot be traced symbolically: .*{reason}(.|\n)*vit_pytorch/\w+.py:\d+"):
        mfx.momentumize(model, capture="symbolic")


BY_DYNAMO = {
    "cct.CCT": [2, 2, 2],
    "rvt.RvT": [2, 4],
    "vit_5.ViT": [6],
    "vit_with_patch_dropout.ViT": [6],
}


@sampled("path", list(BY_DYNAMO), 1)
def test_what_cannot_be_traced_is_captured_at_the_first_call(path):
    model = build(path, OPTIONS[path])
    net = mfx.momentumize(model, gamma=0.0)
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for function in (net, model):
        torch.manual_seed(1)
        outputs.append(function(x))
    assert torch.equal(*outputs)
    assert sorted(len(chain.steps) for chain in mfx.explain(net).chains) == BY_DYNAMO[path]
