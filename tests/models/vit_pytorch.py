"""The models of vit_pytorch, built as its README or their own files show, at small sizes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

PIXELS, FRAMES = 32, 4


def of(path: str) -> Any:
    """Return what a module of the library defines, by ``module.name``."""
    module, name = path.split(".")
    return getattr(import_module(f"vit_pytorch.{module}"), name)


def build(path: str, options: Mapping[str, Any]) -> nn.Module:
    """A model by ``module.Class``."""
    model: nn.Module = of(path)(**options)
    return model


SIZES = {"num_classes": 10, "dim": 32, "depth": 3, "heads": 2, "mlp_dim": 64}
VIT = {**SIZES, "image_size": PIXELS, "patch_size": 8}
SERIES = {**SIZES, "seq_len": 32, "patch_size": 8}
VIDEO = {**SIZES, "image_size": PIXELS, "image_patch_size": 8, "frames": FRAMES, "frame_patch_size": 2}
DROPOUT = {"dropout": 0.1, "emb_dropout": 0.1}
LAYERS = {"spatial_depth": 2, "temporal_depth": 2}
SPATIAL = {key: value for key, value in {**VIDEO, **LAYERS}.items() if key != "depth"}
CONVOLUTIONAL = {"num_classes": 10, "embedding_dim": 32, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2}
STAGES = {"num_classes": 10, "s1_emb_dim": 16, "s2_emb_dim": 24, "s3_emb_dim": 32}
CROSS = {
    "num_classes": 10,
    "image_size": 64,
    "depth": 2,
    "cross_attn_depth": 2,
    "cross_attn_heads": 2,
    **DROPOUT,
    "sm_dim": 16,
    "sm_patch_size": 8,
    "sm_enc_depth": 2,
    "sm_enc_heads": 2,
    "sm_enc_mlp_dim": 32,
    "lg_dim": 32,
    "lg_patch_size": 16,
    "lg_enc_depth": 3,
    "lg_enc_heads": 2,
    "lg_enc_mlp_dim": 64,
}
LOOPS = dict.fromkeys(["pre_loop_depth", "num_looped_blocks", "post_loop_depth", "loop_depth"], 2)
LOOPED = {key: value for key, value in {**VIT, **LOOPS}.items() if key != "depth"}
MOBILE = {"image_size": (64, 64), "dims": [32, 40, 48], "channels": [16, 16, 24, 24, 32, 32, 40, 40, 48, 48, 64]}
WINDOWS = {"num_classes": 10, "dim": 16, "depth": (2, 2), "dim_head": 8, "window_size": 4, "dropout": 0.1}
ROBOT = {
    "dim": 32,
    "depth": 3,
    "heads": 2,
    "dim_head": 16,
    "mlp_dim": 64,
    "dim_action": 6,
    "action_chunk_len": 3,
    "time_seq_len": 2,
    "num_tasks": 4,
    "dim_extra_token": 9,
}
SIGLIP = {f"siglip_{key}": value for key, value in {**VIT, "depth": 4}.items() if key != "num_classes"}
LEVIT = {"image_size": 64, "num_classes": 10, "dim": (32, 48, 64), "depth": 2, "heads": (2, 3, 4), "mlp_mult": 2}
NEST = {"image_size": 32, "patch_size": 4, "dim": 16, "heads": 2, "num_hierarchies": 2, "block_repeats": (2, 2)}
TOKENS = {**SIZES, "image_size": PIXELS, "t2t_layers": ((7, 4), (3, 2))}
POOLED = {**VIT, "depth": (2, 2), **DROPOUT}
REGIONS = {"num_classes": 10, "dim": (16, 32, 32, 64), "depth": (2, 2, 2, 2)}
SCALABLE = {
    "num_classes": 10,
    "dim": 8,
    "heads": (1, 2, 4, 8),
    "depth": (2, 2, 2, 2),
    "ssa_dim_key": (8, 8, 8, 8),
    "reduction_factor": (8, 4, 2, 1),
    "window_size": (8, 4, None, None),
    "dropout": 0.1,
}
SEPARABLE = {"num_classes": 10, "dim": 8, "dim_head": 8, "heads": (1, 2, 4, 8), "depth": (1, 2, 2, 2)}
TWINS: dict[str, Any] = {f"s{stage}_{key}": value for stage, dim in enumerate((8, 16, 32, 32), 1) for key, value in {
    "emb_dim": dim, "patch_size": 4 if stage == 1 else 2, "local_patch_size": 2, "global_k": 2, "depth": 2}.items()
} | {"num_classes": 10}  # fmt: skip
SLOTS = {**VIT, "num_slots": (8, 4, 2), "sigreg_slots": (True, False, True), "interactions": ((0, 1), (1, 2), (2, 3))}

CROSSES = {
    "num_classes": 10,
    "dim": (32, 32, 64, 64),
    "depth": (2, 2, 2, 2),
    "global_window_size": (4, 2, 1, 1),
    "local_window_size": 3,
}
LOOK = {
    **{key: value for key, value in VIT.items() if key != "mlp_dim"},
    "depth": 2,
    "dim_head": 16,
    "highres_patch_size": 4,
    "cross_attn_heads": 2,
    "cross_attn_dim_head": 16,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "ats_vit.ViT": {**VIT, **DROPOUT, "max_tokens_per_depth": (16, 12, 8)},
    "attn_residual_with_dca_simple_vit.SimpleViT": VIT,
    "cait.CaiT": {**VIT, **DROPOUT, "cls_depth": 2, "layer_dropout": 0.05},
    "cct.CCT": {**CONVOLUTIONAL, "img_size": 32},
    "cct_3d.CCT": {**CONVOLUTIONAL, "img_size": 32, "num_frames": FRAMES, "frame_kernel_size": 3},
    "cross_vit.CrossViT": CROSS,
    "crossformer.CrossFormer": {
        "num_classes": 10,
        "dim": (32, 32, 64, 64),
        "depth": (2, 2, 2, 2),
        "global_window_size": (4, 2, 1, 1),
        "local_window_size": 3,
    },
    "cvt.CvT": {**STAGES, "s3_depth": 3},
    "deepvit.DeepViT": {**VIT, **DROPOUT},
    "distill.DistillableViT": {**VIT, **DROPOUT},
    "jet_vit.JetViT": {**VIT, "dim_head": 16, "window_size": 2, "attn_layers": ["LA", "WA", "FA"]},
    "jumbo_vit.JumboViT": {**VIT, "jumbo_cls_k": 3},
    "learnable_memory_vit.ViT": {**VIT, **DROPOUT},
    "levit.LeViT": LEVIT,
    "look_vit.LookViT": {
        "dim": 32,
        "image_size": 32,
        "num_classes": 10,
        "depth": 2,
        "patch_size": 8,
        "heads": 2,
        "dim_head": 16,
        "highres_patch_size": 4,
        "cross_attn_heads": 2,
        "cross_attn_dim_head": 16,
    },
    "looped_vit.LoopedViT": LOOPED,
    "max_vit.MaxViT": WINDOWS,
    "max_vit_with_registers.MaxViT": WINDOWS,
    "mobile_vit.MobileViT": {**MOBILE, "num_classes": 10},
    "mp3.ViT": {**VIT, "dropout": 0.1},
    "na_vit.NaViT": {**VIT, **DROPOUT, "token_dropout_prob": 0.1},
    "na_vit_nested_tensor.NaViT": {**VIT, "token_dropout_prob": 0.1},
    "na_vit_nested_tensor_3d.NaViT": {**VIT, "max_frames": FRAMES, "frame_patch_size": 2, "token_dropout_prob": 0.1},
    "nest.NesT": {**NEST, "num_classes": 10},
    "normalized_vit.nViT": VIT,
    "parallel_vit.ViT": {**VIT, **DROPOUT, "num_parallel_branches": 2},
    "pit.PiT": POOLED,
    "regionvit.RegionViT": {**REGIONS, "window_size": 7},
    "rvt.RvT": VIT,
    "scalable_vit.ScalableViT": SCALABLE,
    "sep_vit.SepViT": {**SEPARABLE, "dropout": 0.1},
    "simple_flash_attn_vit.SimpleViT": VIT,
    "simple_flash_attn_vit_3d.SimpleViT": VIDEO,
    "simple_uvit.SimpleUViT": VIT,
    "simple_vit.SimpleViT": VIT,
    "simple_vit_1d.SimpleViT": SERIES,
    "simple_vit_3d.SimpleViT": VIDEO,
    "simple_vit_attn_residual.SimpleViTAttnResidual": VIT,
    "simple_vit_orthog_residual_update.SimpleViT": VIT,
    "simple_vit_with_fft.SimpleViT": {**VIT, "freq_patch_size": 8},
    "simple_vit_with_hyper_connections.SimpleViT": {**VIT, "num_residual_streams": 4},
    "simple_vit_with_patch_dropout.SimpleViT": VIT,
    "simple_vit_with_qk_norm.SimpleViT": VIT,
    "simple_vit_with_register_tokens.SimpleViT": VIT,
    "simple_vit_with_relative_proj_pos_bias.SimpleViT": VIT,
    "simple_vit_with_sparse_gating.SimpleViTWithSparseGating": VIT,
    "simple_vit_with_specialized_cls.SimpleViT": VIT,
    "simple_vit_with_value_residual.SimpleViT": VIT,
    "t2t.T2TViT": TOKENS,
    "twins_svt.TwinsSVT": TWINS,
    "vat_siglip.SigLIPVAT": {**ROBOT, "num_views": 2, **SIGLIP, "vit_layer_indices": (0, 1, 3)},
    "vit.ViT": {**VIT, **DROPOUT},
    "vit_1d.ViT": {**SERIES, **DROPOUT},
    "vit_3d.ViT": {**VIDEO, **DROPOUT},
    "vit_5.ViT": {**VIT, **DROPOUT, "num_registers": 4},
    "vit_detpool.ViTDetPool": {**VIT, **DROPOUT},
    "vit_for_small_dataset.ViT": {**VIT, **DROPOUT},
    "vit_with_decorr.ViT": {**VIT, **DROPOUT},
    "vit_with_keel_post_ln.ViT": {**VIT, **DROPOUT},
    "vit_with_patch_dropout.ViT": {**VIT, **DROPOUT},
    "vit_with_patch_merger.ViT": {**VIT, **DROPOUT, "depth": 6, "patch_merge_layer": 3, "patch_merge_num_tokens": 8},
    "vivit.ViViT": {**SPATIAL, "variant": "factorized_encoder"},
    "vivit_with_moss.ViViT": SPATIAL,
    "wwt.WWT": {**SLOTS, "num_register_tokens": 4, "num_register_slots": (4, 4, 2)},
    "xcit.XCiT": {**VIT, **DROPOUT, "cls_depth": 2, "layer_dropout": 0.05, "local_patch_kernel_size": 3},
}
"""Of each model that stands for itself, by ``module.Class``."""
