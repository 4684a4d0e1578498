"""The largest batch or sequence that fits, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from examples.benchmarks.on_gpu.jobs import Job, Setting
from examples.benchmarks.on_gpu.machine import is_out_of_memory, memory_of, peak, release
from examples.benchmarks.on_gpu.methods import EAGER, Training, made
from examples.benchmarks.on_gpu.models import Model, models, small_models

CLOSE = 1 / 16  # of the largest that fits


def largest(fits: Callable[[int], bool], start: int, unit: int, found: dict[str, Any], close: float = CLOSE) -> None:
    """Bisect for the largest number that fits; ``found`` always holds the largest that did, as "fits".

    Args:
        fits: True if a number fits; if one does, smaller ones do.
        start: the first number tried.
        unit: numbers are multiples of it.
        found: what is known so far.
        close: end where the smallest that does not fit is as near as this share.
    """
    low, high, at = 0, None, start
    while high is None or high - low > max(unit, close * low):
        if fits(at):
            low = at
            found["fits"] = low
        else:
            high = at
            found["does not fit"] = high
            if high <= unit:
                return
        middle = 2 * low if high is None else (low + high) // 2
        at = max(unit, middle // unit * unit)
        if at in (low, high):
            return


def measure(found: dict[str, Any], setting: Setting, model: Model, method: str) -> None:
    """Find the largest step of a method within the setting's memory, parameters and their gradients included."""
    device = setting.where
    net = model.built(device)
    held = 2 * sum(p.nbytes for p in net.parameters())
    memory = min(setting.memory, memory_of(device) or setting.memory)
    found["GiB"] = round(memory / 2**30, 3)
    call = made(method, net)

    def fits(units: int) -> bool:
        try:
            step = Training(call, model.input(device, units))
            step()
            needed = held + step.x.nbytes + peak(step, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            needed = memory + 1
        release(device)
        return needed <= memory

    unit = 1 if model.unit == "images" else max(1, model.units // 16)
    largest(fits, model.units // 2, unit, found, 1.0 if setting.tiny else CLOSE)
    found["unit"] = model.unit


def jobs(setting: Setting) -> Sequence[Job]:
    """A decoder's sequence, and batches of images."""
    chosen = small_models()[:1] if setting.tiny else [models()[index] for index in (4, 1, 2)]
    return [
        Job(model.name, method, partial(measure, setting=setting, model=model, method=method), 90)
        for model in chosen
        for method in (EAGER[:2] if setting.tiny else EAGER)
    ]
