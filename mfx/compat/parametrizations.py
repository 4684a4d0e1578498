"""The cache of ``torch.nn.utils.parametrize.cached()``, which is torch's and of all threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.nn.utils import parametrize

CachedWeights = Mapping[tuple[int, str], Tensor | None]


def cached_weights() -> CachedWeights | None:
    """Return the weights that are cached now, detached; None outside of ``cached()`` (torch 2.11 to 2.15)."""
    if not parametrize._cache_enabled:
        return None
    return {key: weight if weight is None else _detached(weight) for key, weight in parametrize._cache.items()}


def are_weights_cached() -> bool:
    """True inside of ``cached()`` (torch 2.11 to 2.15)."""
    return parametrize._cache_enabled > 0


def _detached(weight: Tensor) -> Tensor:
    return weight.detach().requires_grad_(weight.requires_grad)[...]  # not a leaf: autocast caches its casts of leaves


@contextmanager
def weights_cached(weights: CachedWeights | None) -> Iterator[None]:
    """Within this context, these weights are cached; with None no weight is. Read in torch 2.11 to 2.15."""
    # A number of entrances, which other threads may change meanwhile.
    entrances = (weights is not None) - parametrize._cache_enabled
    before = parametrize._cache
    parametrize._cache_enabled += entrances
    parametrize._cache = dict(weights or {})
    try:
        yield
    finally:
        parametrize._cache_enabled -= entrances
        parametrize._cache = before
