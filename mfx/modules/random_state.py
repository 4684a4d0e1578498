"""Puts random generators back after a trace, and tells which were drawn from."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mfx_passes import paths


@dataclass(frozen=True)
class _Generator:
    """A source of random numbers, with functions that read and set its state."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[list[str]]:
    """Put all random generators back at the end, also after an error.

    Yields:
        Filled at the end: names of the generators that were drawn from.
    """
    generators = list(_generators(model))
    before = [generator.read() for generator in generators]
    drawn: list[str] = []
    try:
        yield drawn
    finally:
        for generator, state in zip(generators, before, strict=True):
            if not _same(generator.read(), state):
                drawn.append(generator.name)
                generator.write(state)


_PLAIN = {bool, int, float, str, type(None), dict, OrderedDict, set, list, tuple}  # nearly all that a module holds


def _generators(model: nn.Module) -> Iterator[_Generator]:
    yield _Generator("torch", torch.random.get_rng_state, torch.random.set_rng_state)
    yield _Generator("random", random.getstate, random.setstate)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield _Generator("numpy.random", numpy.random.get_state, numpy.random.set_state)
    if torch.cuda.is_initialized():
        yield _Generator("torch.cuda", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) not in _PLAIN:
                yield from _own_generator(paths.join(path, name), value)


def _own_generator(name: str, value: Any) -> Iterator[_Generator]:
    """Yield the generator that a value of a module's is, or that it is a method of."""
    value = getattr(value, "__self__", value)
    if isinstance(value, random.Random):
        yield _Generator(name, value.getstate, value.setstate)
    elif isinstance(value, torch.Generator):
        yield _Generator(name, value.get_state, value.set_state)
    elif type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
        bits = value.bit_generator
        yield _Generator(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
    elif type(value).__module__.startswith("numpy.random") and hasattr(value, "get_state"):
        yield _Generator(name, value.get_state, value.set_state)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)
