"""Words of memory that tell if a generator was drawn from: its whole state takes long to read, and longer to compare.

They are some of a Mersenne Twister's memory, if that can be found: the position, and the first words. All of them are
renewed after so many draws. The first word is the same after every seed; the second is not.
"""

from __future__ import annotations

import ctypes
import random
import sys
from functools import cache
from typing import Any

import torch

from mfx.compat.words import Sign, version_sign, words_at

_WORDS = 624  # of 4 bytes
_BEFORE = 20  # bytes that torch has before the words: the seed, of 8, the number of words left, and of the next one
_BEHIND = 28  # and behind them: a gap, and spare Gaussians in two precisions


def sign_of_torch() -> Sign | None:
    """Return what changes when the CPU's default generator is drawn from or seeded; None if that is not found."""
    return _SIGN_OF_TORCH


def _find_sign_of_torch() -> Sign | None:
    """Find that sign, where torch 2.11 to 2.15 have them.

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
    return Sign([words_at(start, _BEFORE + 12), words_at(start + _BEFORE + 4 * _WORDS, _BEHIND)])


@cache
def sign_of_python() -> Sign | None:
    """Return what changes when Python's generator is drawn from or seeded; None if that is not found.

    It is the position and three words, where CPython 3.10 to 3.14 have them, and the spare Gaussian, an attribute.
    """
    if sys.implementation.name != "cpython":
        return None
    instance: Any = random._inst
    address = id(instance) + object.__basicsize__
    *words, position = random.getstate()[1]
    found = (ctypes.c_uint32 * 4).from_address(address)
    if [*found] != [position, *words[:3]]:
        return None
    own, spare = words_at(address, 16), version_sign([instance.__dict__], [instance])
    return Sign([own], lambda: instance.gauss_next) if spare is None else Sign([own, *spare.words])


def sign_of_numpy() -> Sign | None:
    """Return what changes when numpy's generator is drawn from or seeded; None if that is not found.

    If it gets other bits, that changes, too, and there is another sign from then on.
    """
    import numpy

    generator, size = numpy.random.mtrand._rand, _size_of_random_state()
    bits = _words_of_bits(generator._bit_generator)
    return Sign([words_at(id(generator) + object.__basicsize__, size), *bits]) if size and bits else None


@cache
def _size_of_random_state() -> int:
    """Return the bytes of a generator of numpy in which it has a spare Gaussian and refers to its bits.

    It is tried on another one; 0 if they are not there.
    """
    from numpy.random import RandomState

    size = RandomState.__basicsize__ - object.__basicsize__
    other = RandomState(0)
    read = words_at(id(other) + object.__basicsize__, size).tobytes
    seen = [read()]
    for _ in range(2):  # the first leaves a spare, the second uses it
        other.standard_normal()
        seen.append(read())
    has_spare = seen[1] not in (seen[0], seen[2])
    return size if has_spare and id(other._bit_generator).to_bytes(8, sys.byteorder) in seen[0] else 0


@cache
def _words_of_bits(bits: Any) -> tuple[memoryview, ...]:
    """Return three words and the position; none if they are not found.

    Read by ``BitGenerator.ctypes``, which numpy documents; the layout was read in numpy 1.26 to 2.3.
    """
    if type(bits).__name__ != "MT19937":
        return ()
    address, state = bits.ctypes.state_address, bits.state["state"]
    found = (ctypes.c_uint32 * (_WORDS + 1)).from_address(address)
    if [*found] != [*state["key"].tolist(), state["pos"]]:
        return ()
    return words_at(address, 12), words_at(address + 4 * _WORDS, 4)


_SIGN_OF_TORCH = _find_sign_of_torch()  # now, while nobody observes
