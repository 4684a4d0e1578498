"""The sample of a large set of tests that runs by default: another part every day; all of it with ``-m zoo``.

The ids of what the day chose end in the number that chose it; the environment variable MFX_ZOO_SAMPLE sets it.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pytest

Item = TypeVar("Item")


def number() -> int:
    """Return the number that chooses the sample: days since 1970, or MFX_ZOO_SAMPLE."""
    return int(os.environ.get("MFX_ZOO_SAMPLE", time.time() // 86400))


def sample(items: Sequence[Item], count: int, offset: int = 0) -> list[Item]:
    """As many of the items as are asked for, others every day until all had their turn."""
    start = number() * count + offset
    return [items[(start + i) % len(items)] for i in range(min(count, len(items)))]


def sampled(name: str, values: Mapping[str, Any] | Sequence[Any], count: int) -> pytest.MarkDecorator:
    """Parametrizes a test with ``name``: ``count`` of the values by default.

    Args:
        name: of the argument; or several, separated by commas, where values are tuples.
        values: by id; or values that are their own ids.
        count: how many are tested by default.
    """
    chosen, is_tuple = set(sample(_ids(values), count)), "," in name
    params = [_param(value if is_tuple else [value], key, key in chosen) for key, value in _named(values)]
    return pytest.mark.parametrize(name, params)


def grid(count: int, /, **axes: Mapping[str, Any] | Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with all combinations of values of its arguments.

    Args:
        count: how many combinations are tested by default; if as many as an argument has values, all of these are
            among them.
        **axes: the values of each argument, by id; or values that are their own ids.
    """
    named = [_named(values) for values in axes.values()]
    chosen = set(zip(*(_column(len(values), count, axis) for axis, values in enumerate(named)), strict=True))
    params = [
        _param(
            [values[i][1] for values, i in zip(named, indices, strict=True)],
            "-".join(values[i][0] for values, i in zip(named, indices, strict=True)),
            indices in chosen,
        )
        for indices in itertools.product(*(range(len(values)) for values in named))
    ]
    return pytest.mark.parametrize(", ".join(axes), params)


def _column(size: int, count: int, axis: int) -> list[int]:
    """Indices below ``size`` in a random order, each as often as any other, but for one."""
    rng = random.Random(f"{number()} {axis}")
    rounds = [rng.sample(range(size), size) for _ in range(-(-count // size))]
    column = list(itertools.chain(*rounds))[:count]
    rng.shuffle(column)
    return column


def _named(values: Mapping[str, Any] | Sequence[Any]) -> list[tuple[str, Any]]:
    return list(values.items()) if isinstance(values, Mapping) else [(_id(value), value) for value in values]


def _ids(values: Mapping[str, Any] | Sequence[Any]) -> list[str]:
    return [key for key, _ in _named(values)]


def _id(value: Any) -> str:
    """A name of the value that is the same in every process, as workers that share the tests need it."""
    if isinstance(value, tuple):
        return "-".join(map(_id, value))
    name: str = getattr(value, "__name__", None) or str(value)
    if " at 0x" in name:
        raise ValueError(f"{name}: this name holds an address; give values by id, in a dictionary")
    return name


def _param(values: Sequence[Any], key: str, is_chosen: bool) -> Any:
    if is_chosen:
        return pytest.param(*values, id=f"{key}-sample{number()}")
    return pytest.param(*values, id=key, marks=pytest.mark.zoo)
