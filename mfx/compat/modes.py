"""Autocast, dispatch and function modes, transforms and export: read, left and entered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes


def under_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is around (torch 2.11 to 2.15)."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


AutocastState = tuple[torch.dtype, bool, bool]


def autocast_state(device_type: str) -> AutocastState:
    """Autocast for ``device_type``: its dtype, whether it is on, whether it caches (torch 2.11 to 2.15)."""
    return (
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_enabled(device_type),
        torch.is_autocast_cache_enabled(),
    )


def modes() -> tuple[bool, ...]:
    """What a model may switch while it runs: gradients, autocast, and which kernels of attention may be taken."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


@contextmanager
def modes_left() -> Iterator[None]:
    """After the block, modes are what they were, even if it failed before it could leave those that it had entered."""
    grad, *_, flash, efficient, math, cudnn = modes()
    depth, states = _autocast_depth(), {kind: autocast_state(kind) for kind in ("cpu", "cuda")}
    try:
        yield
    except BaseException:
        for _ in range(_autocast_depth() - depth):
            torch.autocast_decrement_nesting()
        if not depth:
            torch.clear_autocast_cache()
        for kind, (dtype, enabled, caches) in states.items():
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_cache_enabled(caches)
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)
        torch.backends.cuda.enable_math_sdp(math)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        raise
    finally:
        torch.set_grad_enabled(grad)


def _autocast_depth() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def autocast_as(device_type: str, state: AutocastState) -> AbstractContextManager[object]:
    """A context that puts autocast for ``device_type`` into that state."""
    dtype, enabled, caches = state
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=caches)


def has_modes() -> bool:
    """Whether anybody looks on at operations, in a mode of this thread's (torch 2.11 to 2.15)."""
    return torch._C._len_torch_dispatch_stack() > 0


def without_modes() -> AbstractContextManager[object]:
    """A context in which operations are what they are without anybody looking on (torch 2.11 to 2.15)."""
    return _disable_current_modes()


@contextmanager
def outside_of_export() -> Iterator[None]:
    """If torch.export looks on: without its modes, in which new tensors have no values and which Dynamo minds.

    Read in torch 2.13 to 2.14.
    """
    if not torch.compiler.is_exporting():
        yield
        return
    modes = _get_current_function_mode_stack()
    _replace_function_modes([mode for mode in modes if type(mode).__module__ not in _EXPORT])
    try:
        with _disable_current_modes():
            yield
    finally:
        _replace_function_modes(modes)


_EXPORT = ("torch._export.non_strict_utils", "torch.export._safeguard", "torch.fx.experimental.proxy_tensor")


def _replace_function_modes(modes: Sequence[Any]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
