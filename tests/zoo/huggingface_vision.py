"""Models of Hugging Face's transformers that look: images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.models.huggingface import BASE, CONVNEXT, DEPTH, DINO, HEADS, PATCHES, SWIN, WIDTH, Family, Inputs, image


def larger(batch: int, length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def labelled(batch: int, length: int) -> Inputs:
    return {**larger(batch, length), "labels": torch.randint(0, 2, (batch,))}


def segmented(batch: int, length: int) -> Inputs:
    return {**larger(batch, length), "labels": torch.randint(0, 2, (batch, 64, 64))}


def video(batch: int, length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 4, 3, 32, 32)}


def model(
    name: str, prefix: str, options: Mapping[str, Any], reads: Any = larger, head: str = "Model", **more: Any
) -> Family:
    return Family(name, f"{prefix}{head}", f"{prefix}Config", options, reads, **more)


STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]}
HEADED = {**STAGES, "num_attention_heads": [1, 2, 2, 4]}
CLASSES, DENSE = "ForImageClassification", "ForSemanticSegmentation"
VIT = {**BASE, **PATCHES}
VIDEO = {**VIT, "num_frames": 4}
MAE = {
    **VIT,
    "decoder_num_attention_heads": HEADS,
    "decoder_hidden_size": WIDTH,
    "decoder_num_hidden_layers": DEPTH,
    "decoder_intermediate_size": 2 * WIDTH,
}
SWIFT = {"depths": [2, 2, 2, 2], "embed_dims": [8, 16, 24, 32], "image_size": 64}
MOBILE = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32], "image_size": 64}
UNITS = {"base_attn_unit_dims": [32, 32, 32], "n_attn_blocks": [2, 2, 2], "image_size": 64, "width_multiplier": 0.5}
EFFICIENT = {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640, "image_size": 64}
CVT = {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}
LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 4], "depths": [2, 2, 2]}
FOCAL = {"image_size": 64, "embed_dim": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2]}
HIERA = {"image_size": [64, 64], "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
DPT = {**VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]}
DETECTS = {**VIT, "image_size": [64, 64], "num_detection_tokens": 4}
JEPA = {
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": 4,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH,
    "pred_hidden_size": WIDTH,
    "pred_num_attention_heads": HEADS,
    "pred_num_hidden_layers": DEPTH,
    "pred_num_mask_tokens": 2,
}


def clip(batch: int, length: int) -> Inputs:
    return {"pixel_values_videos": torch.randn(batch, 4, 3, 32, 32)}


FAMILIES = [
    model("deit", "DeiT", VIT, image, CLASSES),
    model("beit", "Beit", VIT, image, CLASSES),
    model("vit_msn", "ViTMSN", VIT, image, CLASSES),
    model("ijepa", "IJepa", VIT, image, CLASSES),
    model("vit_mae", "ViTMAE", MAE, image, "ForPreTraining"),
    model("vitdet", "VitDet", {**VIT, "pretrain_image_size": 32}, image),
    model("dinov3", "DINOv3ViT", {**VIT, **DINO}, image),
    model("yolos", "Yolos", DETECTS),
    model("dpt", "DPT", {**DPT, "image_size": 64, "fusion_hidden_size": 16}, segmented, DENSE),
    model("swinv2", "Swinv2", SWIN, image),
    model("donut-swin", "DonutSwin", SWIN, image),
    model("convnext", "ConvNext", CONVNEXT, image),
    model("segformer", "Segformer", {**HEADED, "decoder_hidden_size": 32}, segmented, DENSE),
    model("glpn", "GLPN", {**HEADED, "decoder_hidden_size": 32}),
    model("pvt", "Pvt", {**HEADED, "image_size": 64}, labelled, CLASSES),
    model("pvt_v2", "PvtV2", {**HEADED, "image_size": 64}, labelled, CLASSES),
    model("poolformer", "PoolFormer", STAGES, labelled, CLASSES),
    model("mobilevit", "MobileViT", MOBILE, labelled, CLASSES),
    model("mobilevitv2", "MobileViTV2", UNITS, labelled, CLASSES),
    model("mobilenet_v2", "MobileNetV2", {"depth_multiplier": 0.35, "image_size": 64}, labelled, CLASSES),
    model("swiftformer", "SwiftFormer", SWIFT, labelled, CLASSES),
    model("resnet", "ResNet", {**STAGES, "embedding_size": 8}, labelled, CLASSES),
    model("regnet", "RegNet", {**STAGES, "embedding_size": 8, "groups_width": 8}, labelled, CLASSES),
    model("bit", "Bit", {**STAGES, "embedding_size": 8, "num_groups": 2}, labelled, CLASSES),
    model("efficientnet", "EfficientNet", EFFICIENT, labelled, CLASSES),
    model("cvt", "Cvt", CVT, labelled, CLASSES),
    model("levit", "Levit", LEVIT, labelled, CLASSES),
    model("focalnet", "FocalNet", FOCAL, labelled, CLASSES),
    model("hiera", "Hiera", HIERA, labelled, CLASSES),
    model("videomae", "VideoMAE", VIDEO, video, "ForVideoClassification"),
    model("timesformer", "Timesformer", VIDEO, video, "ForVideoClassification"),
    model("vivit", "Vivit", {**VIDEO, "tubelet_size": [2, 8, 8]}, video, "ForVideoClassification"),
    model("vjepa2", "VJEPA2", JEPA, clip),
]
