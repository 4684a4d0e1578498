"""Cheap signs that a generator has been drawn from: its whole state takes long to read, and longer to compare."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any

_WORDS = 624  # of a Mersenne Twister, which are all renewed after so many draws


def sign_of_python() -> Hashable:
    """Return what changes when Python's generator is drawn from or seeded: the position, a word, a spare Gaussian.

    The position is read where CPython 3.10 to 3.14 have it, after the object's head, and only if it is there.
    """
    words = _words_of_python()
    return None if words is None else (words(), random._inst.gauss_next)  # type: ignore[attr-defined]


@cache
def _words_of_python() -> Callable[[], tuple[int, ...]] | None:
    if sys.implementation.name != "cpython":
        return None
    words = (ctypes.c_uint32 * 4).from_address(id(random._inst) + object.__basicsize__)
    state = random.getstate()[1]
    if (words[0], *words[1:3]) != (state[_WORDS], *state[:2]):
        return None
    # The first word is the same after every seed; the second is not.
    return partial(tuple, words)


def sign_of_numpy() -> Hashable:
    """Return what changes when numpy's generator is drawn from or seeded, but for the use of a spare Gaussian.

    Read by ``BitGenerator.ctypes``, which numpy documents; the layout was read in numpy 1.26 to 2.3.
    """
    import numpy

    words = _words_of_numpy(numpy.random.mtrand._rand._bit_generator)
    return None if words is None else words()


@cache
def _words_of_numpy(bits: Any) -> Callable[[], tuple[int, int]] | None:
    if type(bits).__name__ != "MT19937":
        return None
    address, state = bits.ctypes.state_address, bits.state["state"]
    word = ctypes.c_uint64.from_address(address)  # two words: the first is the same after many seeds
    position = ctypes.c_int32.from_address(address + 4 * _WORDS)
    key = int(state["key"][0]) | int(state["key"][1]) << 32
    if (word.value, position.value) != (key, state["pos"]):
        return None
    return lambda: (word.value, position.value)
