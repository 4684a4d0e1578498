"""Launches, synchronisations and copies of a training step, counted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from examples.benchmarks.on_gpu.jobs import Job, Setting
from examples.benchmarks.on_gpu.machine import traffic
from examples.benchmarks.on_gpu.methods import EAGER, Training, made
from examples.benchmarks.on_gpu.models import Model, gpt2, models, tokens

DEPTHS = 8, 16  # a chain of 16 and of 32 steps: walked back in every dtype


def per_block(found: dict[str, Any], setting: Setting, method: str) -> None:
    """Count what a further block of two residual steps costs, forward and backward, and a whole step's waits."""
    counted = []
    for depth in DEPTHS:
        model = Model("stack", partial(gpt2, depth, 64, 2), partial(tokens, 64, 2), 64, "tokens", torch.float32)
        counted.append(_counted(model, setting, method))
    shallow, deep = counted
    found["launches per block"] = (deep["launches"] - shallow["launches"]) / (DEPTHS[1] - DEPTHS[0])
    found.update({name: count for name, count in deep.items() if name != "launches"})


def whole(found: dict[str, Any], setting: Setting, model: Model, method: str) -> None:
    """Count what a training step of a model does."""
    found.update(_counted(model, setting, method))


def _counted(model: Model, setting: Setting, method: str) -> dict[str, Any]:
    device = setting.where
    step = Training(made(method, model.built(device)), model.input(device))
    for _ in range(3):  # graphs are captured, kernels compiled, what changes is found out
        step()
    found: dict[str, Any] = dict(traffic(step, device))
    if device.type == "cuda":
        found["waits that torch warns of"] = _warned(step)
    return found


def _warned(step: Training) -> int:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing" in str(warning.message) for warning in said)


def jobs(setting: Setting) -> Sequence[Job]:
    """A stack of blocks by every method, then models."""
    found = [
        Job("a further block of 2 steps", method, partial(per_block, setting=setting, method=method))
        for method in (EAGER[:1] + EAGER[-1:] if setting.tiny else EAGER)
    ]
    for model in () if setting.tiny else models()[1:3]:
        found += [
            Job(model.name, method, partial(whole, setting=setting, model=model, method=method)) for method in EAGER
        ]
    return found
