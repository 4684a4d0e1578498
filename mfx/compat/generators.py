"""Cheap signs that a generator has been drawn from: its whole state takes long to read, and longer to compare.

A sign is some of a Mersenne Twister's memory, if that can be found: the position, and the first words. All of them are
renewed after so many draws. The first word is the same after every seed; the second is not.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

_WORDS = 624  # of 4 bytes
_BEFORE = 20  # bytes that torch has before the words: the seed, of 8, the number of words left, and of the next one
_BEHIND = 28  # and behind them: a gap, and spare Gaussians in two precisions


def sign_of_torch() -> Hashable:
    """Return what changes when the CPU's default generator is drawn from or seeded; None if that is not found."""
    return None if (read := _MEMORY_OF_TORCH) is None else (read[0](), read[1]())


def _memory_of_torch() -> tuple[Callable[[], bytes], Callable[[], bytes]] | None:
    """Return functions that read what changes, where torch 2.11 to 2.15 have it.

    The place is found in another generator, by its seed.
    """
    other: Any = torch.Generator("cpu")
    default: Any = torch.default_generator
    seed = 0x1E3779B97F4A7C15
    other.manual_seed(seed)
    place = ctypes.string_at(other._cdata, 256).find(seed.to_bytes(8, sys.byteorder))
    if place < 0:
        return None
    torch.randint(2, (7,), generator=other, device="cpu")
    state = other.get_state().view(torch.int64)[3 : 3 + _WORDS].tolist()  # each word in 8 bytes
    words = (ctypes.c_uint32 * _WORDS).from_address(other._cdata + place + _BEFORE)
    if [*words] != state:
        return None
    start = default._cdata + place
    return _reader(start, _BEFORE + 12), _reader(start + _BEFORE + 4 * _WORDS, _BEHIND)


def sign_of_python() -> Hashable:
    """Return what changes when Python's generator is drawn from or seeded; None if that is not found."""
    return None if (read := _memory_of_python()) is None else (read(), random._inst.gauss_next)  # type: ignore[attr-defined]


@cache
def _memory_of_python() -> Callable[[], bytes] | None:
    """Return a function that reads the position and three words, where CPython 3.10 to 3.14 have them."""
    if sys.implementation.name != "cpython":
        return None
    address = id(random._inst) + object.__basicsize__
    *words, position = random.getstate()[1]
    found = (ctypes.c_uint32 * 4).from_address(address)
    return _reader(address, 16) if [*found] == [position, *words[:3]] else None


def sign_of_numpy() -> Hashable:
    """Return what changes when numpy's generator is drawn from or seeded, but for the use of a spare Gaussian."""
    import numpy

    read = _memory_of_numpy(numpy.random.mtrand._rand._bit_generator)
    return None if read is None else (read[0](), read[1]())


@cache
def _memory_of_numpy(bits: Any) -> tuple[Callable[[], bytes], Callable[[], bytes]] | None:
    """Return functions that read three words and the position.

    Read by ``BitGenerator.ctypes``, which numpy documents; the layout was read in numpy 1.26 to 2.3.
    """
    if type(bits).__name__ != "MT19937":
        return None
    address, state = bits.ctypes.state_address, bits.state["state"]
    found = (ctypes.c_uint32 * (_WORDS + 1)).from_address(address)
    if [*found] != [*state["key"].tolist(), state["pos"]]:
        return None
    return _reader(address, 12), _reader(address + 4 * _WORDS, 4)


def _reader(address: int, size: int) -> Callable[[], bytes]:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B").tobytes


_MEMORY_OF_TORCH = _memory_of_torch()  # now, while nobody observes
