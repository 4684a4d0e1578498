"""Accelerators of any type: generators, streams, copies to the host, graph capture, by `torch.get_device_module`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mfx.compat.modes import without_modes
from mfx.compat.words import Sign

_HOSTS = frozenset({"cpu", "meta"})
_NOTHING: AbstractContextManager[object] = nullcontext()


def accelerator() -> str | None:
    """Return the type of the accelerator that this process uses; None if it has used none so far."""
    found = torch.accelerator.current_accelerator()
    if found is None:
        return None
    module: Any = torch.get_device_module(found)
    uses = getattr(module, "is_initialized", module.is_available)
    return found.type if uses() else None


def has_float64(device: torch.device) -> bool:
    """True if tensors on a device can be of float64."""
    if device.type == "mps":
        return False
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return bool(getattr(_module(device), "has_float64", True))


def _module(device: torch.device) -> Any:
    try:
        return torch.get_device_module(device)
    except RuntimeError:  # a type of device that torch knows, without a module
        return None


# --- generators -------------------------------------------------------------------------------------------------------


def devices_with_generators(kind: str) -> list[torch.device]:
    """Return the devices of a type that have a default generator, whether or not there is a tensor on them."""
    if kind in _HOSTS:
        return []
    module = _module(torch.device(kind))
    if not hasattr(module, "get_rng_state"):
        return []
    return [torch.device(kind, index) for index in range(module.device_count())]


def random_state_of(device: torch.device) -> Tensor:
    """Return the state of a device's default generator, without waiting for the device."""
    with without_modes():  # on fake tensors, too, the state is real
        state: Tensor = _module(device).get_rng_state(*_index(device))
    return state


def set_random_state_of(device: torch.device, state: Tensor) -> None:
    """Set the state of a device's default generator."""
    with without_modes():
        _module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # of which there is one


def sign_of_device(device: torch.device) -> Sign | None:
    """Return what changes when a device's default generator is drawn from or seeded; None if that is not found.

    A counter-based generator is a seed and an offset (CUDA's and XPU's, torch 2.11 to 2.15).
    """
    generator = _default_generator(device)
    try:
        generator.get_offset()
    except (AttributeError, RuntimeError):
        return None
    return Sign((), lambda: (generator.initial_seed(), generator.get_offset()))


def _default_generator(device: torch.device) -> Any:
    generators = getattr(_module(device), "default_generators", ())
    return generators[device.index] if device.index < len(generators) else None


# --- streams ----------------------------------------------------------------------------------------------------------


def current_stream(device: torch.device) -> Any:
    """Return the stream in which this thread queues work for a device; None if it has none."""
    if device.type in _HOSTS:
        return None
    find = getattr(_module(device), "current_stream", None)
    return None if find is None else find(device)


def in_stream(device: torch.device, stream: Any) -> AbstractContextManager[Any]:
    """Return a context that queues work for a device in ``stream``, as `current_stream` has returned it."""
    if stream is None or stream == current_stream(device):
        return _NOTHING
    context: AbstractContextManager[Any] = _module(device).stream(stream)
    return context


def make_ready(tensor: Tensor, made_in: Any) -> None:
    """Let the present stream read a tensor that was made in another one, and its memory live until it has."""
    if made_in is None:
        return
    here = current_stream(tensor.device)
    if here != made_in:
        here.wait_stream(made_in)
        tensor.record_stream(here)


def side_stream(device: torch.device) -> Any:
    """Return the stream of this process for copies beside the computation; None for a device without streams."""
    if current_stream(device) is None:
        return None
    return _side_stream(device)


@cache
def _side_stream(device: torch.device) -> Any:
    return _module(device).Stream(device)


def event_in(stream: Any, device: torch.device) -> Any:
    """Return an event that is over when all is done that was queued in a stream of a device."""
    event = _module(device).Event()
    event.record(stream)
    return event


# --- copies to the host -----------------------------------------------------------------------------------------------


class HostCopy:
    """Numbers under way from one device to the host, which waits for them when it reads them and not before.

    Args:
        values: 0-dim tensors on one device.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        together = torch.stack([value.to(torch.float32) for value in values])
        # torch pins the memory that it copies to, for CUDA and for what registers as a private device.
        self._host = together.to("cpu", non_blocking=True)
        self._values: list[float] | None = None
        self._device = together.device
        make = None if together.is_cpu else getattr(_module(together.device), "Event", None)
        self._event: Any = None
        if make is not None:
            self._event = make()
            stream = current_stream(together.device)
            self._event.record(*([] if stream is None else [stream]))
        elif not together.is_cpu:  # there is no telling when a copy has arrived
            self._host = together

    def has_arrived(self) -> bool:
        """True if reading waits for nothing, or if there is no telling; while a graph is captured nothing arrives."""
        return self._event is None or (not is_capturing(self._device) and bool(self._event.query()))

    def values(self) -> list[float]:
        """Return the numbers."""
        if self._values is None:
            if self._event is not None and not self._event.query():
                self._event.synchronize()
            self._values, self._event = self._host.tolist(), None
        return self._values


# --- graph capture ----------------------------------------------------------------------------------------------------


def is_capturing(device: torch.device) -> bool:
    """True if this thread's work for a device is captured as a graph, instead of running."""
    if device.type in _HOSTS:
        return False
    ask = getattr(_module(device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


@contextmanager
def without_draws(device: torch.device) -> Iterator[None]:
    """While a graph is captured, let a draw from the device's default generator fail: `is_refused_draw` tells.

    The generator gets a state that the graph does not know. Reading its own state is an error during a capture, so
    there would be no telling whether it was drawn from (``graphsafe_set_state``, torch 2.11 to 2.15).
    """
    generator = _default_generator(device)
    if generator is None or not hasattr(generator, "graphsafe_set_state"):
        yield
        return
    before = generator.graphsafe_get_state()
    generator.graphsafe_set_state(type(generator)(device=device).graphsafe_get_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(before)


def is_refused_draw(error: RuntimeError) -> bool:
    """True for the error of a draw `without_draws`."""
    return "generator not in capture mode" in str(error)


# --- choice of algorithms ---------------------------------------------------------------------------------------------


class _Benchmark:
    """cudnn's choice of algorithms by measurement, switched off while somebody asks for it, in all threads."""

    def __init__(self) -> None:
        self._lock, self.askers, self._before = threading.Lock(), 0, False

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if not self.askers:
                self._before = torch.backends.cudnn.benchmark
                torch.backends.cudnn.benchmark = False
            self.askers += 1
        try:
            yield
        finally:
            with self._lock:
                self.askers -= 1
                if not self.askers:
                    torch.backends.cudnn.benchmark = self._before


_benchmark = _Benchmark()


def reproducible_on(device: torch.device) -> Callable[[], AbstractContextManager[object] | None]:
    """Return what makes contexts for both runs of a branch on ``device``; None instead if there is nothing to do.

    With ``torch.backends.cudnn.benchmark`` each thread measures algorithms for itself, and may choose another one
    (torch 2.11 to 2.15), so that is off. While a graph is captured, random numbers are refused.
    """
    is_host, is_set = device.type in _HOSTS, torch._C._get_cudnn_benchmark

    def reproducible() -> AbstractContextManager[object] | None:
        measures = is_set() or _benchmark.askers > 0
        if not is_host and is_capturing(device):
            return _captured(device, measures=measures)
        return _benchmark.off() if measures else None

    return reproducible


@contextmanager
def _captured(device: torch.device, *, measures: bool) -> Iterator[None]:
    with _benchmark.off() if measures else _NOTHING, without_draws(device):
        yield
