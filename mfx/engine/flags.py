"""Errors and warnings about a chain's numbers, said without waiting for the device.

A flag on another device than the CPU is copied to the host beside what the device does, when the backward pass ends or
at the chain's next call, and is read at a call that finds it arrived, when the net is saved or looked at, or at the end
of the process. Where the user asked for an error, the end of the backward pass waits for it, once, so that no optimizer
uses the gradients.
"""

from __future__ import annotations

import atexit
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from mfx.compat import (
    NO_TASK,
    HostCopy,
    current_stream,
    current_task,
    is_capturing,
    is_sharded,
    make_ready,
    when_task_ends,
)
from mfx.engine.steps import ChainCache
from mfx.modules.state_lock import StateLock
from mfx_passes.errors import MfxError

_ADVICE = (
    "Look for nondeterministic operations (torch.use_deterministic_algorithms), for Python state, and for random "
    "numbers that are not torch's"
)


@dataclass(eq=False)
class _Flag:
    value: Tensor
    action: str
    message: Callable[[float], str]
    warned: set[str]  # topics of the chain, which it is known by
    made_in: Any = None  # the stream
    copy: HostCopy | None = None  # of this flag and others; none yet, or the flag is computed anew by a captured graph
    place: int = 0
    is_captured: bool = False
    is_awaited: bool = False  # by the end of the backward pass

    def number(self) -> float:
        """Return the value, for which this waits if need be."""
        if self.copy is None:
            return float(_whole(self.value))
        return self.copy.values()[self.place]


_UNREAD: dict[int, _Flag] = {}  # by number; of all chains, also of those whose net is gone
_NUMBERS = itertools.count()
_TASKS: set[int] = set()  # backward passes with flags that are not sent yet


def notice_overflow(place: str, overflowed: Tensor, cache: ChainCache, firsts: Iterable[Tensor] = ()) -> None:
    """Raise an MfxError that names ``place`` unless ``overflowed``, the largest value that was too large, is 0.

    Args:
        place: the chain and the step.
        overflowed: the value, on the chain's device.
        cache: the chain's.
        firsts: tensors of which a backward pass through the chain computes the gradient of at least one; at the end of
            that pass the error is raised at the latest. None: it may come later.
    """
    flag = _Flag(overflowed, "raise", partial(_overflow_message, place), _warned(cache))
    _read(flag)
    if _is_away(overflowed) and not (overflowed.is_meta or flag.is_captured):
        for first in firsts:
            first.register_hook(partial(_await, flag))


def _await(flag: _Flag, gradient: Tensor) -> None:
    """Have the end of this backward pass wait for a flag of the forward pass."""
    flag.is_awaited = True
    _end_with(current_task())


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
    """Read the flags of a chain that have arrived from the device, and warn or raise."""
    if _UNREAD:
        warned = _warned(cache)
        own = [flag for flag in list(_UNREAD.values()) if flag.warned is warned]
        _send(own)
        arrived = {id(flag) for flag in own if flag.copy is not None and flag.copy.has_arrived()}
        _say(_take(lambda flag: id(flag) in arrived))


def read_all() -> None:
    """Read all flags that chains have left on the device, and warn or raise."""
    _say(_take())


def warn_once(topic: str, message: str, lock: StateLock) -> None:
    """Warn once per net and topic: many chains and steps, and every pass, would say the same."""
    _warn(topic, message, lock.warned)


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
    flag.made_in, flag.is_captured = current_stream(flag.value.device), is_capturing(flag.value.device)
    _UNREAD[next(_NUMBERS)] = flag
    task = current_task()
    flag.is_awaited = flag.action == "raise" and task != NO_TASK and not flag.is_captured
    _end_with(task)


def _end_with(task: int) -> None:
    """Read the flags that are awaited at the end of a backward pass, if this is one."""
    if task != NO_TASK and task not in _TASKS:
        _TASKS.add(task)
        when_task_ends(partial(_end_task, task))


def _end_task(task: int) -> None:
    """Send the flags of a backward pass to the host, together; wait for those that are to be errors."""
    _TASKS.discard(task)
    unread = list(_UNREAD.values())
    _send([flag for flag in unread if flag.copy is None])
    if chains := {id(flag.warned) for flag in unread if flag.is_awaited}:
        _say(_take(lambda flag: id(flag.warned) in chains))


def _send(flags: Sequence[_Flag]) -> None:
    """Start copying flags to the host, in one transfer a device."""
    flags = [flag for flag in flags if flag.copy is None and not flag.is_captured]
    for device in {flag.value.device for flag in flags}:
        if is_capturing(device):  # these flags are none of that graph's
            continue
        there = [flag for flag in flags if flag.value.device == device]
        for flag in there:
            make_ready(flag.value, flag.made_in)
        copy = HostCopy([_whole(flag.value) for flag in there])
        for place, flag in enumerate(there):
            flag.copy, flag.place = copy, place


def _is_away(value: Tensor) -> bool:
    return value.device.type != "cpu"


def _take(which: Callable[[_Flag], bool] = lambda flag: True) -> list[_Flag]:
    """Return some unread flags, which count as read from now on, but for what a captured graph computes anew."""
    found = []
    for number, flag in list(_UNREAD.items()):
        if which(flag) and (flag.is_captured or _UNREAD.pop(number, None) is not None):
            found.append(flag)
    return found


def _say(flags: Sequence[_Flag]) -> None:
    """Warn or raise for each flag that is not 0, and wait for those that are under way."""
    _send([flag for flag in flags if _is_away(flag.value)])
    values = [flag.number() for flag in reversed(flags)][::-1]  # the last one arrives last: that is one wait
    for flag, value in zip(flags, values, strict=True):
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
        _say([replace(flag, action="warn") for flag in _take()])


def _warned(cache: ChainCache) -> set[str]:
    warned: set[str] = cache.setdefault("warned", set())
    return warned


def _warn(topic: str, message: str, warned: set[str]) -> None:
    if topic not in warned:
        warned.add(topic)
        warnings.warn(f"mfx: {message}", stacklevel=4)
