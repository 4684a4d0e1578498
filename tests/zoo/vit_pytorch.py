"""Every model of vit_pytorch that can be built as its README or its own file shows, at small sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.vit_pytorch import FRAMES, OPTIONS, PIXELS, ROBOT, SIZES, VIT, build, of
from tests.zoo.entry import Call, Entry

BATCH = 2
NOTE = "2 or 3 layers of width 32"

# --- arguments of calls -----------------------------------------------------------------------------------------------


def tensor(*shape: int) -> Call:
    return (torch.randn(BATCH, *shape),), {}


def images(pixels: int = PIXELS) -> Call:
    return tensor(3, pixels, pixels)


def videos() -> Call:
    return tensor(3, FRAMES, PIXELS, PIXELS)


def ragged(*leading: int) -> list[Tensor]:
    """Images of different sizes, or videos with so many frames."""
    return [torch.randn(3, *leading, *size) for size in ((32, 32), (16, 16), (16, 32))]


def listed(*leading: int) -> Call:
    return (ragged(*leading),), {}


def grouped() -> Call:
    first, *others = ragged()
    return ([[first], others],), {}


def labelled() -> Call:
    return (torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(0, 10, (BATCH,))), {}


def seen() -> Call:
    """Return what a robot saw (two views of two frames), felt, and did."""
    views, tasks = torch.randn(BATCH, 2, 3, 2, PIXELS, PIXELS), torch.randint(0, 4, (BATCH,))
    return (views,), {"actions": torch.randn(BATCH, 3, 6), "tasks": tasks, "extra": torch.randn(BATCH, 9)}


LARGER, LARGEST, SERIES = partial(images, 64), partial(images, 224), partial(tensor, 3, 32)
CALLS: dict[str, Callable[[], Call]] = {
    "accept_video_wrapper.AcceptVideoWrapper": videos,
    "cct_3d.CCT": videos,
    "cross_vit.CrossViT": LARGER,
    "crossformer.CrossFormer": partial(images, 96),
    "cvt.CvT": LARGER,
    "distill.DistillWrapper": labelled,
    "es_vit.EsViTTrainer": LARGER,
    "levit.LeViT": LARGER,
    "levjepa_nd.LeVJEPAND": partial(tensor, 3, FRAMES, 16, 16),
    "max_vit.MaxViT": LARGER,
    "max_vit_with_registers.MaxViT": LARGER,
    "mobile_vit.MobileViT": LARGER,
    "na_vit.NaViT": grouped,
    "na_vit_nested_tensor.NaViT": listed,
    "na_vit_nested_tensor_3d.NaViT": partial(listed, FRAMES),
    "regionvit.RegionViT": partial(images, 56),
    "scalable_vit.ScalableViT": LARGER,
    "sep_vit.SepViT": LARGEST,  # its windows are of 7, whatever its options say
    "simple_flash_attn_vit_3d.SimpleViT": videos,
    "simple_vit_1d.SimpleViT": SERIES,
    "simple_vit_3d.SimpleViT": videos,
    "twins_svt.TwinsSVT": LARGER,
    "vat.VAT": seen,
    "vat_siglip.SigLIPVAT": seen,
    "vit_1d.ViT": SERIES,
    "vit_3d.ViT": videos,
    "vivit.ViViT": videos,
    "vivit_with_moss.ViViT": videos,
}
"""Of the models that do not take images of `PIXELS`."""


# --- models around models ---------------------------------------------------------------------------------------------


def model(path: str) -> nn.Module:
    return build(path, OPTIONS[path])


def around(path: str, inner: str, **options: Any) -> nn.Module:
    """A model given to a wrapper, whose first argument it is."""
    name = next(iter(inspect.signature(of(path)).parameters))
    return build(path, {name: model(inner), **options})


def distiller() -> nn.Module:
    from torchvision.models import resnet18

    student, teacher = model("distill.DistillableViT"), resnet18(num_classes=10)
    return build("distill.DistillWrapper", {"student": student, "teacher": teacher, "temperature": 3, "alpha": 0.5})


def efficient_vit() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    options = {key: VIT[key] for key in ("image_size", "patch_size", "num_classes", "dim")}
    return build("efficient.ViT", {**options, "transformer": nn.TransformerEncoder(layer, 3)})


def policy() -> nn.Module:
    eye = build("vat.ViT", VIT)
    return build("vat.VAT", {**ROBOT, "vit": eye, "num_views": 2, "vit_layer_indices": (0, 1, 3)})


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def joint_embedding() -> nn.Module:
    shape = (FRAMES, 16, 16)
    sizes = {key: size for key, size in SIZES.items() if key != "num_classes"}
    encoder = build("levjepa_nd.NDTransformer", {**sizes, "ndim": 3, "input_shape": shape, "patch_size": (1, 8, 8)})
    options = {"encoder": encoder, "input_shape": shape, "augment_src": noisy, "augment_tgt": noisy}
    return build("levjepa_nd.LeVJEPAND", {**options, "drop_ratio": 0.5})


# The library's own augmentation goes by random numbers of Python's.
LEARNER = {
    "projection_hidden_size": 32,
    "projection_layers": 2,
    "num_classes_K": 64,
    "augment_fn": nn.Identity(),
    "augment_fn2": nn.Identity(),
}
# Pretraining by masks expects a position embedding with a batch dimension, which the library's ViT no longer has.
MASKED = {"mask_prob": 0.15, "random_patch_prob": 0.3, "replace_prob": 0.5}

WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "accept_video_wrapper.AcceptVideoWrapper": (
        "vit.ViT",
        {"add_time_pos_emb": True, "time_seq_len": FRAMES, "dim_emb": 10},
    ),
    "dino.Dino": ("vit.ViT", {**LEARNER, "image_size": PIXELS, "hidden_layer": "to_latent"}),
    "es_vit.EsViTTrainer": ("cvt.CvT", {**LEARNER, "image_size": 64, "hidden_layer": "layers"}),
    "extractor.Extractor": ("vit.ViT", {}),
    "learnable_memory_vit.Adapter": ("learnable_memory_vit.ViT", {"num_classes": 4, "num_memories_per_layer": 5}),
    "lejepa.LeJEPA": (
        "vit.ViT",
        {**LEARNER, "image_size": PIXELS, "hidden_layer": "to_latent", "use_sigreg": True},
    ),
    "mae.MAE": ("deepvit.DeepViT", {"decoder_dim": 32, "decoder_depth": 3}),
    "mp3.MP3": ("mp3.ViT", {"masking_ratio": 0.75}),
    "mpp.MPP": ("deepvit.DeepViT", {**MASKED, "patch_size": 8, "dim": 32}),
    "recorder.Recorder": ("vit.ViT", {}),
    "simmim.SimMIM": ("deepvit.DeepViT", {"masking_ratio": 0.5}),
}
"""What is built around a model: the model, and options."""

# --- the list ---------------------------------------------------------------------------------------------------------

MAKE: dict[str, Callable[[], nn.Module]] = {
    **{path: partial(model, path) for path in OPTIONS},
    **{path: partial(around, path, inner, **options) for path, (inner, options) in WRAPPERS.items()},
    "distill.DistillWrapper": distiller,
    "efficient.ViT": efficient_vit,
    "levjepa_nd.LeVJEPAND": joint_embedding,
    "vat.VAT": policy,
}

ENTRIES = [Entry("vit_pytorch", path, MAKE[path], CALLS.get(path, images), NOTE) for path in sorted(MAKE)]

_CLASS_TOKEN = "its own forward fails: it expects a class token of three dimensions, which the model no longer has"
_FLEX = "FlexAttention has no backward pass on a CPU"
LEFT_OUT = {
    "distill.DistillableEfficientViT": _CLASS_TOKEN,
    "distill.DistillableT2TViT": _CLASS_TOKEN,
    "levjepa.LeVJEPA": "its own forward fails: FlexAttention does not take its mask",
    "local_vit.LocalViT": "its own forward fails: a LayerNorm of channels is given them ahead of rows and columns",
    "vaat.VAAT": "it needs torchaudio",
    "vit_nd.ViTND": _FLEX,
    "vit_nd_masking": "functions only",
    "vit_nd_pope.ViTND": _FLEX,
    "vit_nd_rotary.ViTND": _FLEX,
}
"""Models and modules of the library that are not part of the zoo, and why."""
