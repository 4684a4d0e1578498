"""timm: the default run has small models of ten families, ``-m zoo`` the smallest of each at its own size."""

import pytest
import timm

import mfx
from tests.models.judge import Case, judge, judged


def small(name, shapes, chains, rejected=0, *, opaque=0, saves=True, **options):
    def make():
        return timm.create_model(name, num_classes=10, **options)

    return Case(name, make, shapes, chains, rejected, opaque, saves)


def native(name, chains, rejected=0, *, size=224, opaque=0):
    return small(name, [(2, 3, size, size)], chains, rejected, opaque=opaque)


IMAGES = [(4, 3, 64, 64)]

CASES = [
    small("vit_tiny_patch16_224", IMAGES, [12], img_size=64, patch_size=8, embed_dim=48, depth=6, drop_path_rate=0.2),
    small("test_vit_relpos", [(2, 3, 160, 160)], [18]),
    small("eva02_tiny_patch14_224", [(4, 3, 56, 56)], [12], img_size=56, embed_dim=48, num_heads=2, depth=6),
    small("cait_xxs24_224", IMAGES, [12, 4], img_size=64, embed_dim=48, depth=6),
    small("convit_tiny", IMAGES, [8, 4], img_size=64, embed_dim=48, depth=6, local_up_to_layer=4),
    small(
        "swin_tiny_patch4_window7_224",
        IMAGES,
        [4, 4, 12, 4],
        img_size=64,
        window_size=4,
        embed_dim=24,
    ),
    small("convnext_zepto_rms_ols", IMAGES, [2, 2, 4, 2], drop_path_rate=0.2),
    small("poolformer_s12", IMAGES, [4, 4, 12, 4]),
    small("fasternet_t0", IMAGES, [2, 8, 2], 1),
    small("mobilenetv3_small_050", IMAGES, [4, 2], 1),
    small("resnetv2_50", IMAGES, None),
]

# (name, steps of each chain, identity adds left as they are). Opaque: adds inside modules that look at sizes.
ZOO = [
    native("coat_tiny", [2] * 14, 50),
    native("coatnet_nano_rw_224", [2, 3, 11, 5]),
    native("cpubone_nano", [3, 6]),
    native("crossvit_tiny_240", [2, 8, 2, 8, 2, 8], size=240),
    native("cs3darknet_focus_s", [3, 4], 2, size=256),
    native("davit_tiny", [8, 8, 24, 8]),
    native("deit_small_patch16_224", [24]),
    native("dla46x_c", [2, 2], 4),
    native("edgenext_xx_small", [2, 2, 6, 2], 3, size=256),
    native("efficientformer_l1", [6, 4, 12, 6, 2]),
    native("efficientformerv2_s0", [2, 2, 8, 6]),
    native("efficientvim_m1", [10, 9, 9]),
    native("efficientvit_b0", [4, 4], 3),
    native("efficientvit_m0", [7, 14, 17]),
    native("fastvit_t8", [4, 4, 8, 4], size=256),
    native("focalnet_tiny_srf", [4, 4, 12, 4]),
    native("gcvit_xxtiny", [4, 4, 12, 4], 11),
    native("gmlp_ti16_224", [30]),
    native("halonet_h1", [3, 2, 9, 2], size=256),
    native("hardcorenas_b", [2, 2, 3, 3, 2]),
    native("hiera_tiny_224", [3, 13, 3, 2]),
    native("hrnet_w18_small", [2] * 9),
    native("iformer_t", [2, 2, 16, 6]),
    native("legacy_seresnet18", [2], 3),
    native("levit_128s", [4, 7, 9]),
    native("lowformer_b0", [9, 12]),
    native("mobilenetv2_050", [2, 3, 2, 2], 1),
    native("mobilevit_xxs", [2], 1, size=256, opaque=18),
    native("mvitv2_tiny", [2, 3, 3, 2, 2, 2, 3], 10),
    native("nest_tiny", [4, 4, 16]),
    native("nextvit_small", [6, 7, 9, 9, 5], 8),
    native("nf_regnet_b1", [3, 6, 6], 1, size=256),
    native("pit_ti_224", [4, 12, 8]),
    native("pvt_v2_b0", [4, 4, 4, 4]),
    native("regnety_002", [3, 6]),
    native("repghostnet_050", [3, 4], 4),
    native("repvit_m1", [5, 5, 5, 2, 2, 4, 4, 4, 4, 4, 4, 2, 3], 1),
    native("res2next50", [2, 3, 5, 2]),
    native("resnetv2_18", [2], 3),
    native("shvit_s1", [6, 16, 17]),
    native("skresnet18", [2], 3),
    native("starnet_s050", [3], 3),
    native("swiftformer_xs", [5, 5, 8, 6], 4),
    native("swinv2_cr_tiny_224", [4, 4, 12, 3], 1),
    native("swinv2_tiny_window8_256", [4, 4, 12, 4], size=256),
    native("test_mambaout", [3], 3, size=160),
    native("tiny_vit_5m_224", [2], opaque=20),
    native("tnt_s_legacy_patch16_224", [2] * 13, 22),
    native("tresnet_m", [3, 3, 10, 2]),
    native("twins_svt_small", [5, 5, 21, 9]),
    native("visformer_tiny", [7, 8, 8]),
    native("vit_tiny_r_s16_p8_224", [24]),
    native("vitamin_small_224", [28, 3], 1),
    native("volo_d1_224", [28, 8], 2),
    native("xcit_nano_12_p8_224", [36, 2], 2),
]


@judged(CASES, zoo=ZOO, sample=1)
def test_timm(case, verdict):
    judge(case, verdict)


@pytest.mark.parametrize("name", ["dpn48b", "ese_vovnet19b_slim_dw", "densenet121", "convmixer_768_32"])
def test_without_chains(name):
    model = timm.create_model(name)
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        assert mfx.momentumize(model) is model
