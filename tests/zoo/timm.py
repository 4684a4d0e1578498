"""One model of every family of timm, at its own depth and width. A family is a module of `timm.models`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from tests.zoo.entry import Call, Entry

BATCH = 2

# The smallest of each module (see `smallest`) on the smallest images it takes: 64 px (56 for patches of 14), else 128,
# else its own size. True where its size has to be told: ``img_size``.
FAMILIES: Mapping[str, tuple[str, int] | tuple[str, int, bool]] = {
    "beit": ("beit_base_patch16_224", 64, True),
    "byoanet": ("halonet_h1", 256),
    "byobnet": ("mobileone_s1", 64),
    "cait": ("cait_xxs24_224", 64, True),
    "coat": ("coat_tiny", 64, True),
    "convit": ("convit_tiny", 64, True),
    "convmixer": ("convmixer_768_32", 64),
    "convnext": ("convnext_zepto_rms", 64),
    "cpubone": ("cpubone_nano", 64),
    "crossvit": ("crossvit_tiny_240", 64),
    "csatv2": ("csatv2", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "davit": ("davit_tiny", 64),
    "deepseek_vit": ("deepseek_vit_412m", 56),
    "deit": ("deit_tiny_patch16_224", 64, True),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "dpn": ("dpn48b", 64),
    "edgenext": ("edgenext_xx_small", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 64, True),
    "efficientnet": ("mobilenetv2_035", 64),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 64),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 64),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "focalnet": ("focalnet_tiny_srf", 64),
    "gcvit": ("gcvit_xxtiny", 64, True),
    "gemma4_vit": ("gemma4_vit_167m", 64),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hiera": ("hiera_tiny_224", 64, True),
    "hieradet_sam2": ("sam2_hiera_tiny", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 128),
    "inception_v3": ("inception_v3", 128),
    "inception_v4": ("inception_v4", 128),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 64, True),
    "lowformer": ("lowformer_b0", 64),
    "mambaout": ("mambaout_femto", 64),
    "maxxvit": ("maxvit_pico_rw_256", 64, True),
    "metaformer": ("poolformerv2_s12", 64),
    "mlp_mixer": ("gmlp_ti16_224", 64, True),
    "mobilenetv3": ("mobilenetv3_small_050", 64),
    "mobilenetv5": ("mobilenetv5_base", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "mvitv2": ("mvitv2_tiny", 64),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 64),
    "nasnet": ("nasnetalarge", 64),
    "nest": ("nest_tiny", 64, True),
    "nextvit": ("nextvit_small", 64),
    "nfnet": ("nf_regnet_b0", 64),
    "pit": ("pit_ti_224", 64, True),
    "pnasnet": ("pnasnet5large", 64),
    "pvt_v2": ("pvt_v2_b0", 64),
    "qwen3_vit": ("qwen3_vit_88m", 64),
    "rdnet": ("rdnet_tiny", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2next50", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("resnet10t", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "sequencer": ("sequencer2d_s", 64),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 64),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 64, True),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64, True),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, True),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tnt": ("tnt_s_legacy_patch16_224", 64, True),
    "tresnet": ("tresnet_m", 64),
    "twins": ("twins_svt_small", 64),
    "vgg": ("vgg11", 64),
    "visformer": ("visformer_tiny", 64, True),
    "vision_transformer": ("vit_tiny_patch16_224", 64, True),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, True),
    "vision_transformer_relpos": ("vit_srelpos_small_patch16_224", 64, True),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64),
    "vitamin": ("vitamin_small_224", 64, True),
    "volo": ("volo_d1_224", 64, True),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 64),
}


def smallest(module: str) -> str:
    """The model with the fewest parameters, but for those that timm has for its own tests."""
    return min((name for name in timm.list_models(module=module) if not name.startswith("test_")), key=size)


def size(name: str) -> int:
    """Return the number of parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def images(pixels: int) -> Call:
    return (torch.randn(BATCH, 3, pixels, pixels),), {}


def make(name: str, options: Mapping[str, Any]) -> nn.Module:
    return timm.create_model(name, **options)


def entry(name: str, pixels: int, is_told: bool = False) -> Entry:
    options = {"img_size": pixels} if is_told else {}
    return Entry("timm", name, partial(make, name, options), partial(images, pixels), f"{pixels} px")


ENTRIES = [entry(*chosen) for chosen in FAMILIES.values()]
