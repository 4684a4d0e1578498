"""Every model of torchvision for classification, segmentation, video and detection, at its own depth and width."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchvision import models
from torchvision.models.video import mvit

from tests.zoo.entry import Call, Entry

BATCH, PIXELS, FRAMES = 2, 64, 8

# Models that do not take images of 64 px: windows of 7, patches of 14, convolutions without padding.
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56, "regnet_y_128gf": 32}
VIDEOS = {"s3d": (1, 16, 224)}


def images(size: int) -> Call:
    return (torch.randn(BATCH, 3, size, size),), {}


def videos(batch: int, frames: int, size: int) -> Call:
    return (torch.randn(batch, 3, frames, size, size),), {}


def labelled_images(size: int) -> Call:
    """Images with boxes, labels, masks and keypoints to learn from; each model takes what it knows."""
    low, high = size / 8, size * 7 / 8
    middle = size / 2
    boxes = torch.tensor([[low, low, middle, high], [middle, low, high, middle]])
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[:, int(low) : int(middle), int(low) : int(middle)] = 1
    keypoints = torch.cat([boxes.reshape(2, 2, 2)[:, :1].repeat(1, 17, 1) + 2, torch.ones(2, 17, 1)], dim=-1)
    target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.long), "masks": masks, "keypoints": keypoints}
    return ([torch.rand(3, size, size) for _ in range(BATCH)], [target] * BATCH), {}


def make_mvit(name: str) -> nn.Module:
    """Its builders fix the size of what it looks at, and with it the number of its positions."""
    sizes = {"spatial_size": (PIXELS, PIXELS), "temporal_size": FRAMES, "num_classes": 10}
    build = mvit._mvit
    with mock.patch.object(mvit, "_mvit", lambda **options: build(**{**options, **sizes})):
        return models.get_model(name)


def make(name: str, options: Mapping[str, Any]) -> nn.Module:
    return models.get_model(name, weights=None, **options)


def entry(name: str, call: partial[Call], note: str, **options: Any) -> Entry:
    return Entry("torchvision", name, partial(make, name, options), call, note)


def classifier(name: str) -> Entry:
    size = SIZES.get(name, PIXELS)
    options: dict[str, Any] = {"num_classes": 10}
    if name.startswith("vit_"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    return entry(name, partial(images, size), f"{size} px", **options)


def segmenter(name: str) -> Entry:
    return entry(name, partial(images, PIXELS), f"{PIXELS} px", weights_backbone=None)


def video(name: str) -> Entry:
    batch, frames, size = VIDEOS.get(name, (BATCH, FRAMES, PIXELS))
    note, call = f"{frames} frames of {size} px", partial(videos, batch, frames, size)
    if name.startswith("mvit"):
        return Entry("torchvision", name, partial(make_mvit, name), call, note)
    return entry(name, call, note, num_classes=10)


def detector(name: str) -> Entry:
    options: dict[str, Any] = {"weights_backbone": None}
    if not name.startswith("ssd"):
        options |= {"min_size": 2 * PIXELS, "max_size": 2 * PIXELS}
    note = f"{2 * PIXELS} px" if options.get("min_size") else ""
    return entry(name, partial(labelled_images, 2 * PIXELS), note, **options)


def _listed(module: Any) -> list[str]:
    return models.list_models(module=module)


ENTRIES = [
    *map(classifier, _listed(models)),
    *map(segmenter, _listed(models.segmentation)),
    *map(video, _listed(models.video)),
    *map(detector, _listed(models.detection)),
]
