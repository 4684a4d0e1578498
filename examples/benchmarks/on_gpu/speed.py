"""Seconds and peak of a training step by every method, taking turns with plain training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmarks.on_gpu.jobs import Job, Setting
from examples.benchmarks.on_gpu.machine import MIB, is_out_of_memory, peak, release, seconds
from examples.benchmarks.on_gpu.methods import COMPILED, EAGER, PLAIN, Training, made
from examples.benchmarks.on_gpu.models import Model, models, small_models


class _Subject:
    """The model at hand, its input and its plain step; one is held at a time."""

    held: _Subject | None = None

    def __init__(self, model: Model, device: torch.device) -> None:
        self.name = model.name
        self.net: nn.Module = model.built(device)
        self.x: Tensor = model.input(device)
        self.plain: Training | None = Training(self.net, self.x)
        self.plain_peak: int | None = None
        if not _fits(self.plain):
            self.plain = None

    @classmethod
    def of(cls, model: Model, device: torch.device) -> _Subject:
        """Return the subject for a model; the one before is forgotten first."""
        if cls.held is None or cls.held.name != model.name:
            cls.held = None
            release(device)
            cls.held = cls(model, device)
        return cls.held


def _fits(step: Training) -> bool:
    try:
        step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def measure(found: dict[str, Any], setting: Setting, model: Model, method: str) -> None:
    """Time steps of a method and of plain training by turns, and note the peaks of both."""
    device = setting.where
    subject = _Subject.of(model, device)
    plain = subject.plain
    step = plain if method == PLAIN and plain is not None else Training(made(method, subject.net), subject.x)
    for _ in range(2):  # graphs are captured and code is compiled
        step()
    if plain is not None and subject.plain_peak is None:
        subject.plain_peak = peak(plain, device)
    highest = subject.plain_peak if step is plain else peak(step, device)
    assert highest is not None
    found["peak, MiB"] = round(highest / MIB, 1)
    if subject.plain_peak is not None:
        found["peak, to plain"] = highest / subject.plain_peak
    of_plain, of_method = [], []
    for _ in range(setting.rounds):
        if plain is not None and step is not plain:
            of_plain.append(seconds(plain, device))
        of_method.append(seconds(step, device))
    found["ms"] = 1e3 * statistics.median(of_method)
    if plain is not None:
        found["time, to plain"] = statistics.median(of_method) / statistics.median(of_plain or of_method)


def jobs(setting: Setting) -> Sequence[Job]:
    """All models without a compiler, then with it, by importance."""
    chosen = small_models()[:1] if setting.tiny else models()
    sweeps = [(chosen, EAGER, 60.0)] if setting.tiny else [(chosen, EAGER, 90.0), (chosen, COMPILED, 240.0)]
    return [
        Job(model.name, method, partial(measure, setting=setting, model=model, method=method), limit)
        for subjects, methods, limit in sweeps
        for model in subjects
        for method in methods
    ]
