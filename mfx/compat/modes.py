"""Autocast, dispatch and function modes, transforms and export: read, observed, left and entered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from mfx.compat.patching import patching


def under_transform() -> bool:
    """True within a torch.func transform or forward-mode differentiation (torch 2.11 to 2.15)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def takes_saved_tensors_hooks() -> bool:
    """True unless the caller has disabled them, by ``torch.autograd.graph`` (torch 2.11 to 2.15)."""
    autograd: Any = torch._C._autograd
    return bool(autograd._saved_tensors_hooks_is_enabled())


_HOST = torch.device("cpu")


def default_device() -> torch.device:
    """Return the device that tensors are made on; unlike torch's own function it calls none that a mode could see."""
    stack = reversed(_get_current_function_mode_stack())
    return next((mode.device for mode in stack if isinstance(mode, DeviceContext)), _HOST)


_MODES = (torch.autocast, torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)

AutocastState = tuple[torch.dtype, bool, bool]


def autocast_kinds() -> list[str]:
    """Return the types of devices whose autocast a program may switch: the CPU's, and the accelerator's or CUDA's."""
    found = torch.accelerator.current_accelerator()
    kinds = ("cpu", "cuda" if found is None else found.type)
    return [kind for kind in kinds if torch.amp.is_autocast_available(kind)]


def autocast_state(device_type: str) -> AutocastState:
    """Return autocast's state for ``device_type``: its dtype, if it is on, if it caches (torch 2.11 to 2.15)."""
    return (
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_enabled(device_type),
        torch.is_autocast_cache_enabled(),
    )


_call: Any = partial.__call__  # at C speed in map


def autocast_reader(device_types: Sequence[str]) -> Callable[[], list[object]]:
    """Return a function that reads all that makes up autocast's states for these types of devices."""
    of_types: tuple[Callable[[str], object], ...] = (torch.get_autocast_dtype, torch.is_autocast_enabled)
    reads: list[Any] = [partial(read, kind) for kind in device_types for read in of_types]
    reads.append(partial(torch.is_autocast_cache_enabled))
    return lambda: [*map(_call, reads)]


def modes() -> tuple[bool, ...]:
    """Return the switches that a model may change while it runs: gradients, autocast, kernels of attention."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *map(torch.is_autocast_enabled, autocast_kinds()),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


@contextmanager
def modes_observed(
    entered: Callable[[str], object], left: Callable[[], object], seeded: Callable[[], object]
) -> Iterator[None]:
    """Observe the modes that this thread enters and leaves within the block (torch 2.11 to 2.15).

    Methods of torch's classes are patched, for all threads; other threads are not observed.

    Args:
        entered: called with the name of a mode before it is entered.
        left: called before a mode is left.
        seeded: called before the state of the random generator is set.
    """
    thread = threading.get_ident()

    def notifying(function: Callable[..., Any], notify: Callable[[], object]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if threading.get_ident() == thread and not _UNOBSERVED.get():
                notify()
            return function(*args)

        return run

    with patching(), ExitStack() as stack:
        for mode in _MODES:
            enter = notifying(mode.__enter__, partial(entered, mode.__name__))
            stack.enter_context(patch.object(mode, "__enter__", enter))
            stack.enter_context(patch.object(mode, "__exit__", notifying(mode.__exit__, left)))
        stack.enter_context(patch.object(torch, "set_rng_state", notifying(torch.set_rng_state, seeded)))
        yield


@contextmanager
def modes_unobserved() -> Iterator[None]:
    """Let code within an observed block enter modes that are not the model's."""
    token = _UNOBSERVED.set(True)
    try:
        yield
    finally:
        _UNOBSERVED.reset(token)


_UNOBSERVED: ContextVar[bool] = ContextVar("unobserved", default=False)


@contextmanager
def modes_left() -> Iterator[None]:
    """Put the modes back after the block, even if it fails before it leaves those that it has entered."""
    grad, *_, flash, efficient, math, cudnn = modes()
    depth, states = _autocast_depth(), {kind: autocast_state(kind) for kind in autocast_kinds()}
    transforms, level = torch._C._functorch.get_dynamic_layer_stack_depth(), forward_ad._current_level
    try:
        yield
    except BaseException:
        while forward_ad._current_level > level:
            forward_ad.exit_dual_level()
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(transforms)
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
    """Return a context that puts autocast for ``device_type`` into that state."""
    dtype, enabled, caches = state
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=caches)


def has_modes() -> bool:
    """True if a dispatch mode of this thread sees operations (torch 2.11 to 2.15)."""
    return torch._C._len_torch_dispatch_stack() > 0


def without_modes() -> AbstractContextManager[object]:
    """Return a context in which no dispatch mode sees operations (torch 2.11 to 2.15)."""
    return _disable_current_modes()


def written_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an operation seen in a dispatch mode writes to (torch 2.11 to 2.15)."""
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    arguments = enumerate(operation._schema.arguments)
    return [given.get(argument.name, given.get(i)) for i, argument in arguments if argument.is_write]


def has_function_modes() -> bool:
    """True if a function mode sees operations, but for the default device (torch 2.11 to 2.15)."""
    return not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Within this context, no function mode sees operations, but for the default device (torch 2.11 to 2.15)."""
    modes = _get_current_function_mode_stack()
    _replace_function_modes([mode for mode in modes if isinstance(mode, DeviceContext)])
    try:
        yield
    finally:
        _replace_function_modes(modes)


def _replace_function_modes(modes: Sequence[Any]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
