"""Iterators that a model holds: where they are, whether they were advanced, and how they are left alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

from mfx.modules.holders import Holder
from mfx.modules.python_state import PythonState, is_iterator

_DEPTH = 4  # an iterator over a list iterator in a zip in a map


def position_of(iterator: Any, depth: int = _DEPTH) -> tuple[Any, ...]:
    """Return what changes as an iterator is advanced, for ``holders.same``; never the same if that cannot be seen."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        return ("over",) if frame is None else (frame.f_lasti, iterator.gi_yieldfrom, *frame.f_locals.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # itertools no longer says, from Python 3.14 on
            reduced = iterator.__reduce__()
    except TypeError:
        said = repr(iterator)  # count(5)
        return (object() if said == object.__repr__(iterator) else said,)
    return tuple(_flat(reduced[1:], depth))


def _flat(value: Any, depth: int) -> Iterator[Any]:
    if is_iterator(value) and depth:
        yield position_of(value, depth - 1)
    elif isinstance(value, tuple):
        for item in value:
            yield from _flat(item, depth)
    else:
        yield repr(value) if isinstance(value, range) else value


@contextmanager
def iterators_left_alone(state: PythonState, refuse: Callable[[str], None] = lambda iterator: None) -> Iterator[None]:
    """Within this context, code that advances an iterator of a model advances a copy of it.

    Args:
        state: that of the model.
        refuse: called first, with the name of the iterator's type.
    """
    if not state.iterators:
        yield
        return
    stand_ins = {key: _StandIn(iterator, refuse) for key, iterator in state.iterators.items()}
    back = {id(stand_in): state.iterators[key] for key, stand_in in stand_ins.items()}
    try:
        for holder in state.holders():
            _replace(holder, stand_ins)
        yield
    finally:
        for holder in state.holders():
            _replace(holder, back)


def _replace(holder: Holder, by: dict[int, Any]) -> None:
    now = holder.kind.read(holder.value)
    if any(id(item) in by for item in now):
        holder.kind.write(holder.value, tuple(by.get(id(item), item) for item in now))


class _StandIn:
    """Takes the place of an iterator."""

    def __init__(self, iterator: Any, refuse: Callable[[str], None]) -> None:
        self._iterator, self._refuse = iterator, refuse
        self._copied: Any = None

    def __iter__(self) -> _StandIn:
        return self

    def __next__(self) -> Any:
        self._refuse(type(self._iterator).__name__)
        if self._copied is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._copied = copy.deepcopy(self._iterator)
        return next(self._copied)
