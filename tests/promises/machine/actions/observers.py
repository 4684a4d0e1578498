"""Modes, caches and observers that people have open around a call."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mfx

Seen = list[Any]


class _Functions(TorchFunctionMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            self._seen.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self._seen.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


@contextmanager
def _flops(seen: Seen) -> Iterator[None]:
    with FlopCounterMode(display=False) as counter:
        yield
    seen.append(counter.get_total_flops())


@contextmanager
def _profiled(seen: Seen) -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    seen.append(sum(event.count for event in profile.key_averages() if event.key == "aten::addmm"))


@contextmanager
def _hooked_globally(seen: Seen) -> Iterator[None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if type(module) is nn.Linear and not mfx.recomputing():
            seen.append(tuple(output.shape))

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _doubled(seen: Seen) -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: (t.clone(), 1), lambda pair: pair[0])


OBSERVERS: dict[str, Callable[[Seen], AbstractContextManager[Any]]] = {
    "nothing": lambda seen: nullcontext(),
    "autocast": lambda seen: torch.autocast("cpu", torch.bfloat16),
    "FlopCounterMode": _flops,
    "function mode": _Functions,
    "dispatch mode": _Operations,
    "global hook": _hooked_globally,
    "profiler": _profiled,
    "parametrize.cached": lambda seen: nn.utils.parametrize.cached(),
    "saved_tensors_hooks": _doubled,
    "save_on_cpu": lambda seen: torch.autograd.graph.save_on_cpu(),
    "detect_anomaly": lambda seen: torch.autograd.detect_anomaly(check_nan=False),
    "fork_rng": lambda seen: torch.random.fork_rng(),
    "device": lambda seen: torch.device("cpu"),
    "original": lambda seen: nullcontext(),
}
"""By name: a context, which may note what it saw of the call in a list."""

GRADIENTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
