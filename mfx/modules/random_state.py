"""Random generators: found, read and put back, and which were drawn from."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from mfx import compat
from mfx_passes import paths


class RandomState(NamedTuple):
    """The state of a generator, and a sign that changes with it; None if there is no such sign."""

    sign: Hashable
    value: Any


@dataclass(frozen=True)
class Generator:
    """A source of random numbers, with functions that read and set its state.

    Attributes:
        sign: returns what changes whenever the state does, if that is cheaper to read.
        device: the device whose default generator it is, but for the CPU.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    sign: Callable[[], compat.Sign | None] = lambda: None
    device: torch.device | None = None

    def state(self, before: RandomState | None = None) -> RandomState:
        """Return the present state; ``before`` itself, if it is still the present one."""
        found = self.sign()
        sign = None if found is None else compat.sign_reader([found])()
        if before is not None and sign is not None and sign == before.sign:
            return before
        # Unseen, so that observers see as much in every call.
        with compat.unprofiled(), compat.without_modes(), compat.without_function_modes():
            value = self.read()
            if before is not None and _same(value, before.value):
                return before
        return RandomState(sign, value)


_GENERATOR_OF_CPU = Generator("torch", torch.random.get_rng_state, torch.random.set_rng_state, compat.sign_of_torch)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[list[str]]:
    """Put all random generators back at the end, also after an error.

    Yields:
        Filled at the end: names of the generators that were drawn from.
    """
    generators = list(generators_for(model))
    before = [generator.read() for generator in generators]
    drawn: list[str] = []
    try:
        yield drawn
    finally:
        for generator, state in zip(generators, before, strict=True):
            if not _same(generator.read(), state):
                drawn.append(generator.name)
                generator.write(state)


def global_generators(device: torch.device) -> list[Generator]:
    """Return the generators that code beside a stream on ``device`` may draw from: torch's, Python's, numpy's.

    torch's are the CPU's and those of all devices of the accelerator, for a branch may draw on another device than the
    stream's. While a graph is captured, no generator of a device can be read: they are left out.
    """
    accelerator = compat.accelerator()
    kinds = () if compat.is_capturing(device) else tuple(sorted({device.type, accelerator or "cpu"}))
    return _global_generators_of(kinds, "numpy" in sys.modules)


@cache
def _global_generators_of(kinds: tuple[str, ...], has_numpy: bool) -> list[Generator]:
    devices = [device for kind in kinds for device in compat.devices_with_generators(kind)]
    return [
        _GENERATOR_OF_CPU,
        *map(_generator_of_device, devices),
        *_others(),
    ]


def _generator_of_device(device: torch.device) -> Generator:
    read, write = partial(compat.random_state_of, device), partial(compat.set_random_state_of, device)
    return Generator(f"torch.{device}", read, write, partial(compat.sign_of_device, device), device=device)


def _others() -> Iterator[Generator]:
    yield Generator("random", random.getstate, random.setstate, compat.sign_of_python)
    if "numpy" in sys.modules:
        from numpy import random as numpy_random

        read = partial(numpy_random.get_state, legacy=False)  # the usual form does for one kind of bits only
        yield Generator("numpy.random", read, numpy_random.set_state, compat.sign_of_numpy)


_PLAIN = {bool, int, float, str, type(None)}  # nearly all that a module holds
_CONTAINERS = {dict, OrderedDict, set, list, tuple}
_LARGE = 64  # entries of a container that is not looked into


def generators_for(model: nn.Module) -> Iterator[Generator]:
    """Yield all generators that a call of a model may draw from."""
    yield _GENERATOR_OF_CPU
    yield from _others()
    if (accelerator := compat.accelerator()) is not None:
        yield from map(_generator_of_device, compat.devices_with_generators(accelerator))
    files: dict[str, None] = {}
    for path, module in model.named_modules():
        files[type(module).__module__] = None
        yield from generators_of(module, path)
    for file in files:
        if not file.startswith("torch."):
            yield from _global_generators(file)


def generators_of(module: nn.Module, path: str) -> Iterator[Generator]:
    """Yield the generators that attributes of a module hold, also in small containers and one attribute deep."""
    for name, value in vars(module).items():
        if type(value) in _PLAIN or (type(value) in _CONTAINERS and (not value or name.startswith("_"))):
            continue
        for held in _held_by(value):
            yield from _own_generator(paths.join(path, name), held)


def _held_by(value: Any) -> Iterator[Any]:
    if type(value) in _CONTAINERS:
        if len(value) <= _LARGE:
            yield from value.values() if isinstance(value, dict) else value
        return
    yield value
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict and len(attributes) <= _LARGE and not isinstance(value, nn.Module | torch.Tensor):
        yield from attributes.values()


def _global_generators(file: str) -> Iterator[Generator]:
    """Yield the generators that the file of a class holds."""
    for name, value in list(vars(sys.modules.get(file, random)).items()):
        for held in _held_by(value) if type(value) in _CONTAINERS and not name.startswith("__") else [value]:
            if isinstance(held, random.Random | torch.Generator) or type(held).__module__.startswith("numpy.random"):
                yield from _own_generator(f"{file}.{name}", held)


def _own_generator(name: str, value: Any) -> Iterator[Generator]:
    """Yield the generator that a value is, or that it is a method of."""
    value = getattr(value, "__self__", value)
    if value is random._inst:
        return
    if isinstance(value, random.Random):
        yield Generator(name, value.getstate, value.setstate)
    elif isinstance(value, torch.Generator):
        yield Generator(name, value.get_state, value.set_state)
    elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
        bits = value.bit_generator
        yield Generator(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
    elif type(value).__module__.startswith("numpy.random") and hasattr(value, "get_state"):
        yield Generator(name, partial(value.get_state, legacy=False), value.set_state)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
