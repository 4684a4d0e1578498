"""Functions that keep their results (`functools.lru_cache`): what mfx computes aside from calls is not among these."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from types import CellType
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx import compat
from mfx.modules.iterators import iterators_left_alone
from mfx.modules.python_state import PythonState, state_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def is_plain(value: object) -> bool:
    """True for numbers, texts and the like, and tuples of these: nobody changes them, and they hold no tensor."""
    return type(value) in _PLAIN or (isinstance(value, tuple) and all(map(is_plain, value)))


@contextmanager
def results_not_kept(
    model: nn.Module | PythonState, refuse: Callable[[str], None] = lambda function: None
) -> Iterator[None]:
    """Within this context, functions that a model's forward may call keep no tensors that they are given or compute.

    Iterators that it holds are not advanced, but copies of them.

    Plain results of plain arguments are looked up and kept as always. For the others the function runs, for calls of
    this thread; ``refuse`` is called with its name.

    Args:
        model: the model, or its state.
        refuse: called with the name of a function that would have kept its result, or returned one that it had kept,
            and with that of an iterator's type.
    """
    state = state_of(model) if isinstance(model, nn.Module) else model
    with iterators_left_alone(state, refuse), _caches_aside(state, refuse):
        yield


@contextmanager
def _caches_aside(state: PythonState, refuse: Callable[[str], None]) -> Iterator[None]:
    if not state.caches:
        yield
        return
    caches = {id(cache): cache for cache in state.caches}
    with compat.patching():
        places = [*chain.from_iterable(_places(h, caches, state.classes) for h in gc.get_referrers(*caches.values()))]
        runs = {key: _running(cache, refuse) for key, cache in caches.items()}
        puts = [(put, value, _replaced(value, runs)) for put, value in places]
        try:
            for put, _, run in puts:
                put(run)
            yield
        finally:
            for put, cache, _ in puts:
                put(cache)


def _running(cache: Any, refuse: Callable[[str], None]) -> Callable[..., Any]:
    """Return what is called in place of a function that keeps its results."""
    thread = threading.get_ident()

    @functools.wraps(cache)
    def run(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return cache(*args, **kwargs)
        result = cache.__wrapped__(*args, **kwargs)
        if is_plain(result) and not any(map(_is_traced, (*args, *kwargs.values()))):
            return cache(*args, **kwargs)
        refuse(cache.__qualname__)
        return result

    run.cache_info, run.cache_clear = cache.cache_info, cache.cache_clear  # type: ignore[attr-defined]
    return run


def _is_traced(value: object) -> bool:
    return isinstance(value, Tensor | fx.Proxy)


def _replaced(value: Any, runs: dict[int, Callable[..., Any]]) -> Any:
    if isinstance(value, staticmethod | classmethod):
        return type(value)(runs[id(value.__func__)])
    return runs[id(value)]


def _places(
    holder: Any, caches: Collection[int], classes: Collection[type]
) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """Yield where code finds one of the caches in what refers to it: how another is put there, and what is there."""
    if isinstance(holder, staticmethod | classmethod) or (isinstance(holder, dict) and "__module__" in holder):
        for cls in classes:
            for name, value in list(vars(cls).items()):
                if value is holder or (isinstance(holder, dict) and id(value) in caches and holder.get(name) is value):
                    yield functools.partial(type.__setattr__, cls, name), value
    elif isinstance(holder, dict):
        for name, value in list(holder.items()):
            if isinstance(name, str) and id(value) in caches:
                yield functools.partial(holder.__setitem__, name), value
    elif isinstance(holder, CellType):
        yield functools.partial(setattr, holder, "cell_contents"), holder.cell_contents
