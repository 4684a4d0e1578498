"""Errors and warnings about a chain's numbers, raised without waiting for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from mfx.engine.steps import ChainCache
from mfx_passes.errors import MfxError

_ADVICE = (
    "Look for nondeterministic operations (torch.use_deterministic_algorithms), for Python state, and for random "
    "numbers that are not torch's"
)


def notice_overflow(place: str, overflowed: Tensor, cache: ChainCache) -> None:
    """Raise an MfxError that names ``place`` unless ``overflowed``, the largest value that was too large, is 0."""
    _read(overflowed, "raise", lambda largest: _overflow_message(place, largest), cache)


def verify_chain(name: str, cache: ChainCache, action: str, same: Tensor) -> None:
    """Warn or raise, as ``action`` says, if a walk back did not end where the forward pass began."""
    error = (
        f"chain {name}: rebuilding the activations did not lead back to where the forward pass began, so gradients are "
        f"wrong: some step did not compute the same values twice. {_ADVICE}"
    )
    _read(~same, action, lambda _: error, cache)


def verify_step(name: str, cache: ChainCache, action: str, path: str, same: Tensor) -> None:
    """Warn or raise, as ``action`` says, if the recomputation of a step differs from the forward pass."""
    error = (
        f"chain {name}, step {path}: the recomputation, in the backward pass, did not compute the values of the "
        f"forward pass, so gradients are those of other values. {_ADVICE}"
    )
    _read(~same, action, lambda _: error, cache)


def read_pending(cache: ChainCache) -> None:
    """Read the flags that earlier calls left in the cache, and warn or raise."""
    for flag, action, message in cache.pop("pending", ()):
        if value := flag.item():
            _act(action, message(value), cache)


def warn_once(topic: str, message: str, cache: ChainCache) -> None:
    """Warn once per chain and topic: many steps, and every pass, would say the same."""
    warned = cache.setdefault("warned", set())
    if topic not in warned:
        warned.add(topic)
        warnings.warn(f"mfx: {message}", stacklevel=4)


def _overflow_message(place: str, largest: float) -> str:
    return (
        f"{place}: values beyond ±4·10⁶, the largest {largest:.3g}, more than arithmetic='exact' can hold. Normalise "
        "or scale what the branches give, see that the training has not diverged, or use arithmetic='float'"
    )


def _read(flag: Tensor, action: str, message: Callable[[float], str], cache: ChainCache) -> None:
    """Warn or raise unless ``flag`` is 0: now if reading it waits for nothing, else at the next call."""
    if flag.device.type != "cpu":
        cache.setdefault("pending", []).append((flag, action, message))
    elif value := flag.item():
        _act(action, message(value), cache)


def _act(action: str, message: str, cache: ChainCache) -> None:
    if action == "raise":
        raise MfxError(message)
    warn_once("values", message, cache)
