"""Every family of torchvision that has identity residual adds, at a size a laptop trains in a second.

Where a class can be had with fewer channels it is; what matters is its forward, not its width.
"""

from functools import partial

import pytest
from torchvision.models import (
    ConvNeXt,
    MaxVit,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    get_model,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video import MViT, SwinTransformer3d
from torchvision.models.video.mvit import MSBlockConfig

import mfx
from tests.models.judge import Case, judge, judged

IMAGES = [(4, 3, 64, 64)]
VIDEO = [(1, 3, 8, 64, 64)]


def image(name, chains, rejected=0, **kw):
    return Case(name, partial(get_model, name, num_classes=10), IMAGES, chains, rejected, **kw)


def segmentation(name, chains, rejected=0):
    make = partial(get_model, name, weights_backbone=None, num_classes=5, aux_loss=True)
    return Case(name, make, [(2, 3, 64, 64)], chains, rejected)


def video(name, chains, rejected=0, **kw):
    return Case(name, partial(get_model, name, num_classes=10, **kw), VIDEO, chains, rejected)


def resnet(name, block, layers, chains, **kw):
    return Case(name, partial(ResNet, block, layers, num_classes=10, **kw), IMAGES, chains)


def swin(name, **kw):
    make = partial(
        SwinTransformer, [4, 4], 24, [2, 2, 6, 2], [2, 2, 4, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=10, **kw
    )
    return Case(name, make, IMAGES, [4, 4, 12, 4])


CONVNEXT = [CNBlockConfig(24, 48, 3), CNBlockConfig(48, 96, 3), CNBlockConfig(96, 128, 9), CNBlockConfig(128, None, 3)]


def mvit(name, chains, rejected=0, **kw):
    pool, keep, halve, quarter = [3, 3, 3], [1, 1, 1], [1, 2, 2], [1, 4, 4]
    blocks = [MSBlockConfig(1, 16, 16, [], pool, [], quarter), MSBlockConfig(2, 16, 32, pool, pool, halve, halve)]
    blocks += [MSBlockConfig(2, 32, 32, pool, pool, keep, halve) for _ in range(4)]
    sizes = {"spatial_size": (64, 64), "temporal_size": 8, "residual_with_cls_embed": False, "num_classes": 10}
    return Case(name, partial(MViT, block_setting=blocks, **sizes, **kw), [(2, 3, 8, 64, 64)], chains, rejected)


CASES = [
    image("resnet18", [2], 3),
    resnet("resnet50", Bottleneck, [3, 4, 6, 3], [2, 3, 5, 2]),
    resnet("resnet101", Bottleneck, [3, 4, 23, 3], [2, 3, 22, 2], width_per_group=16),
    resnet("resnext50", Bottleneck, [3, 4, 6, 3], [2, 3, 5, 2], groups=32, width_per_group=4),
    image("regnet_y_400mf", [2, 5, 5]),
    image("regnet_x_400mf", [6, 11], 1),
    Case("convnext", partial(ConvNeXt, CONVNEXT, 0.1, num_classes=10), IMAGES, [3, 3, 9, 3]),
    image("efficientnet_b0", [2, 2, 3], 2),
    image("mobilenet_v2", [2, 3, 2, 2], 1),
    image("mobilenet_v3_small", [2, 2], 2),
    swin("swin"),
    swin("swin_v2", block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    Case("vit", partial(VisionTransformer, 32, 8, 6, 4, 64, 128, 0.1, 0.1), [(8, 3, 32, 32)], [12]),
    Case(
        "maxvit",
        partial(MaxVit, (64, 64), 16, 4, [16, 32], [2, 2], 8, 0.2, num_classes=10),
        IMAGES,
        [9, 9],
        warns="changes the stream from",  # windows and grid have one shape in the first block, two in the second
    ),
    segmentation("fcn_resnet50", [2, 3, 5, 2]),
    video("r3d_18", [2], 3),
    Case(
        "swin3d",
        partial(SwinTransformer3d, [2, 4, 4], 24, [2, 2, 6, 2], [2, 2, 4, 4], [4, 4, 4], num_classes=10),
        VIDEO,
        [4, 4, 12, 4],
    ),
]

CASES += [
    mvit("mvit_v1", [8, 2], residual_pool=False, rel_pos_embed=False, proj_after_attn=False, stochastic_depth_prob=0.2),
    mvit("mvit_v2", [9, 2], residual_pool=True, rel_pos_embed=True, proj_after_attn=True, stochastic_depth_prob=0.2),
]

ZOO = [
    image("resnet152", [2, 7, 35, 2]),
    image("wide_resnet50_2", [2, 3, 5, 2]),
    image("convnext_tiny", [3, 3, 9, 3]),
    image("efficientnet_v2_s", [2, 3, 3, 5, 8, 14]),
    image("mobilenet_v3_large", [2, 3, 2], 3),
    image("mnasnet0_5", [2, 3, 2, 2], 1),
    image("swin_t", [4, 4, 12, 4]),
    image("swin_v2_t", [4, 4, 12, 4]),
    segmentation("deeplabv3_resnet50", [2, 3, 5, 2]),
    segmentation("deeplabv3_mobilenet_v3_large", [2, 3, 2], 3),
    video("mc3_18", [2], 3),
    video("r2plus1d_18", [2], 3),
    video("swin3d_t", [4, 4, 12, 4]),
]


@judged(CASES, zoo=ZOO, sample=1)
def test_torchvision(case, verdict):
    judge(case, verdict)


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "densenet121", "squeezenet1_0", "shufflenet_v2_x0_5"])
def test_without_residual_adds(name):
    model = get_model(name)
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        assert mfx.momentumize(model) is model
