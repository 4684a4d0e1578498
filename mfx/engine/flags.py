"""Errors and warnings about a chain's numbers, said without waiting for the device.

A flag on another device than the CPU is read when nobody minds the wait: at the chain's next call, when the net is
saved or looked at, at the end of the process. Where the user asked for an error, the end of the backward pass waits for
it, once, so that no optimizer uses the gradients.
"""

from __future__ import annotations

import atexit
import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mfx.compat import NO_TASK, current_task, is_sharded, when_task_ends
from mfx.engine.steps import ChainCache
from mfx_passes.errors import MfxError

_ADVICE = (
    "Look for nondeterministic operations (torch.use_deterministic_algorithms), for Python state, and for random "
    "numbers that are not torch's"
)


class _Flag(NamedTuple):
    value: Tensor
    action: str
    message: Callable[[float], str]
    warned: set[str]  # topics of the chain, which it is known by


_UNREAD: dict[int, _Flag] = {}  # by number; of all chains, also of those whose net is gone
_NUMBERS = itertools.count()


def notice_overflow(place: str, overflowed: Tensor, cache: ChainCache) -> None:
    """Raise an MfxError that names ``place`` unless ``overflowed``, the largest value that was too large, is 0."""
    _read(_Flag(overflowed, "raise", partial(_overflow_message, place), _warned(cache)))


def verify_chain(name: str, cache: ChainCache, action: str, same: Tensor) -> None:
    """Warn or raise, as ``action`` says, if a walk back did not end where the forward pass began."""
    error = (
        f"chain {name}: rebuilding the activations did not lead back to where the forward pass began, so gradients are "
        f"wrong: some step did not compute the same values twice. {_ADVICE}"
    )
    _read(_Flag(~same, action, lambda _: error, _warned(cache)))


def verify_step(name: str, cache: ChainCache, action: str, path: str, same: Tensor) -> None:
    """Warn or raise, as ``action`` says, if the recomputation of a step differs from the forward pass."""
    error = (
        f"chain {name}, step {path}: the recomputation, in the backward pass, did not compute the values of the "
        f"forward pass, so gradients are those of other values. {_ADVICE}"
    )
    _read(_Flag(~same, action, lambda _: error, _warned(cache)))


def read_pending(cache: ChainCache) -> None:
    """Read the flags that a chain has left on the device, and warn or raise."""
    if _UNREAD:
        _say(_take(_warned(cache)))


def read_all() -> None:
    """Read all flags that chains have left on the device, and warn or raise."""
    _say(_take())


def warn_once(topic: str, message: str, cache: ChainCache) -> None:
    """Warn once per chain and topic: many steps, and every pass, would say the same."""
    _warn(topic, message, _warned(cache))


def _overflow_message(place: str, largest: float) -> str:
    return (
        f"{place}: values beyond ±4·10⁶, the largest {largest:.3g}, more than arithmetic='exact' can hold. Normalise "
        "or scale what the branches give, see that the training has not diverged, or use arithmetic='float'"
    )


def _read(flag: _Flag) -> None:
    """Warn or raise unless a flag is 0: now if reading it waits for nothing, else later."""
    if flag.value.is_meta:
        return  # shapes alone have no values to be wrong
    if not _is_away(flag.value):
        _say([flag])
        return
    _UNREAD[next(_NUMBERS)] = flag
    if flag.action == "raise" and current_task() != NO_TASK:
        when_task_ends(lambda: _say(_take(flag.warned)))


def _is_away(value: Tensor) -> bool:
    return value.device.type != "cpu"


def _take(warned: set[str] | None = None) -> list[_Flag]:
    """Return the unread flags, or those of one chain, which count as read from now on."""
    numbers = [number for number, flag in list(_UNREAD.items()) if warned is None or flag.warned is warned]
    return [flag for number in numbers if (flag := _UNREAD.pop(number, None)) is not None]


def _say(flags: Sequence[_Flag]) -> None:
    for device in {flag.value.device for flag in flags}:
        there = [flag for flag in flags if flag.value.device == device]
        # In one transfer: each would wait for the device.
        values = torch.stack([_whole(flag.value).to(torch.float32) for flag in there]).tolist()
        for flag, value in zip(there, values, strict=True):
            if value and flag.action == "raise":
                raise MfxError(flag.message(value))
            if value:
                _warn("values", flag.message(value), flag.warned)


def _whole(flag: Tensor) -> Tensor:
    """Return a flag of values that are distributed over processes as one of all processes."""
    return flag.full_tensor() if is_sharded(flag) else flag  # type: ignore[attr-defined]


@atexit.register
def _read_at_exit() -> None:
    with suppress(RuntimeError):  # of a device that failed
        _say([flag._replace(action="warn") for flag in _take()])


def _warned(cache: ChainCache) -> set[str]:
    warned: set[str] = cache.setdefault("warned", set())
    return warned


def _warn(topic: str, message: str, warned: set[str]) -> None:
    if topic not in warned:
        warned.add(topic)
        warnings.warn(f"mfx: {message}", stacklevel=4)
