"""Leave what a caller has open (modes, caches, observers) for work that is no part of the caller's call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from mfx.compat.modes import has_function_modes, without_function_modes
from mfx.compat.parametrizations import weights_cached


@contextmanager
def aside_from_caller() -> Iterator[None]:
    """Leave what the caller has open around a call, so that nothing observes, keeps or changes the work in this block.

    Left are its observers (see `unobserved`), inference mode, and the caches of autocast and of parametrizations. What
    the model's own function depends on stays: gradients on or off, autocast, the default device, deterministic
    algorithms.

    All is there again afterwards, also after an error. Read in torch 2.13 to 2.14.
    """
    with unobserved(), _without_cached_casts(), weights_cached(None), _outside_of_inference_mode():
        yield


@contextmanager
def unobserved() -> Iterator[None]:
    """Leave what sees or keeps operations of a call and is no part of its function.

    These are dispatch and function modes (counters, a selective checkpoint, torch.export), saved-tensor hooks, the
    profiler and anomaly mode.
    """
    with (
        unprofiled(),
        _disable_current_modes(),
        without_function_modes(),
        _without_saved_tensor_hooks(),
        _without_anomaly_mode(),
    ):
        yield


def in_dispatch_mode() -> bool:
    """True if a dispatch mode sees each operation."""
    return bool(_get_current_dispatch_mode_stack())


def is_observed() -> bool:
    """True if somebody sees, keeps or counts each operation of a call: see `unobserved`, anomaly mode aside."""
    return in_dispatch_mode() or saves_for_others() or has_function_modes() or torch._C._autograd._profiler_enabled()


def saves_for_others() -> bool:
    """True if saved-tensor hooks are active: what autograd saves now is theirs to keep or to recompute."""
    return bool(saved_tensor_hooks())


def saved_tensor_hooks() -> tuple[Callable[..., Any], ...]:
    """Return the saved-tensor hooks that are active: none, or two."""
    top: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
    return tuple(top(True) or ())


class _Unprofiled(threading.local):
    depth = 0


_unprofiled_now = _Unprofiled()


@contextmanager
def unprofiled() -> Iterator[None]:
    """Hide operations from profilers of this thread; torch does not tell if they are hidden already."""
    _unprofiled_now.depth += 1
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        _unprofiled_now.depth -= 1
        torch._C._autograd._enable_record_function(not _unprofiled_now.depth)


@contextmanager
def _without_saved_tensor_hooks() -> Iterator[None]:
    top: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
    hooks = []
    while (last := top(True)) is not None:
        hooks.append(last)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches)


@contextmanager
def _without_anomaly_mode() -> Iterator[None]:
    """Leave the mode that looks for NaN after every operation, in all threads: tensors may be without values."""
    if not torch.is_anomaly_enabled():
        yield
        return
    checks = torch.is_anomaly_check_nan_enabled()
    torch.set_anomaly_enabled(False)
    try:
        yield
    finally:
        torch.set_anomaly_enabled(True, checks)


@contextmanager
def _outside_of_inference_mode() -> Iterator[None]:
    """Leave inference mode: a tensor made in it could not serve a later call that records gradients."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Within this context, hooks on all modules are not called in this thread: the modules run on no real values.

    Read in torch 2.11 to 2.14.
    """
    thread = threading.get_ident()

    def elsewhere(hook: Any) -> Any:
        return lambda *args, **kwargs: None if threading.get_ident() == thread else hook(*args, **kwargs)

    tables = modules._global_forward_pre_hooks, modules._global_forward_hooks
    with ExitStack() as stack:
        for table in filter(None, tables):
            hidden = {key: elsewhere(hook) for key, hook in table.items()}
            stack.enter_context(patch.dict(table, hidden))
        yield
