"""Measurements of a training step: peak of memory, seconds, launches of kernels, synchronisations."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]
MIB = 2**20
_VIEWS = ("detach", "view", "alias", "slice", "select", "expand", "as_strided", "permute", "transpose", "t.default")


def default_device() -> str:
    """Return the accelerator's type, or "cpu" if there is none."""
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None or not torch.accelerator.is_available() else found.type


def describe(device: torch.device) -> str:
    """Return the device's own name."""
    if device.type == "cpu":
        return "cpu"
    module: Any = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory of a device; None for a CPU."""
    if device.type == "cpu":
        return None
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def synchronise(device: torch.device) -> None:
    """Wait for a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more, so that a next measurement starts as the first did."""
    gc.collect()
    if device.type != "cpu":
        with suppress(RuntimeError):  # of a device without such an allocator; one that is lost fails at the next step
            torch.accelerator.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """True if a device, or a limit on its memory, did not have enough."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def peak(step: Step, device: torch.device) -> int:
    """Return the bytes that a step needs at its peak beside what was there before it, scratch memory included."""
    release(device)
    if device.type == "cpu":
        return _peak_on_cpu(step)
    synchronise(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    step()
    synchronise(device)
    return int(torch.accelerator.max_memory_allocated(device) - before)


def _peak_on_cpu(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    live = highest = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


def seconds(step: Step, device: torch.device) -> float:
    """Return the seconds of a step, until the device is done."""
    synchronise(device)
    start = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - start


class _Operations(TorchDispatchMode):
    """Counts operations that would launch something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        name = str(func).removeprefix("aten.")
        self.count += not name.startswith(("empty", "new_empty", *_VIEWS))
        return func(*args, **(kwargs or {}))


def traffic(step: Step, device: torch.device) -> dict[str, int]:
    """Count a step's launches of kernels, its waits for the device, and its copies to and from the host.

    On a CPU the launches are operations that would be one each; there is nothing to wait for.
    """
    if device.type == "cpu":
        with _Operations() as counter:
            step()
        return {"launches": counter.count}
    kinds = {"xpu": ProfilerActivity.XPU} if device.type == "xpu" else {}
    found = _profiled(step, device, kinds.get(device.type, ProfilerActivity.CUDA))
    alone = _profiled(lambda: None, device, kinds.get(device.type, ProfilerActivity.CUDA))  # it waits itself
    return {name: count - alone[name] for name, count in found.items()}


def _profiled(step: Step, device: torch.device, activity: ProfilerActivity) -> dict[str, int]:
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU, activity]) as seen:
        step()
    counts = {"launches": 0, "synchronisations": 0, "from host": 0, "to host": 0}
    for event in seen.profiler.kineto_results.events():
        name, on_device = event.name(), event.device_type() != torch.autograd.DeviceType.CPU
        if on_device and name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
            counts["from host" if "HtoD" in name else "to host"] += 1
        elif on_device and not name.startswith(("Memcpy", "Memset")):
            counts["launches"] += 1
        counts["synchronisations"] += not on_device and "Synchronize" in name
    return counts
