"""Switches of the process on which it depends how something is computed (read in torch 2.14)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

Switched = list[object]

_OF_BACKENDS = (
    "cudnn_enabled",
    "cudnn_deterministic",
    "mkldnn_enabled",
    "mkldnn_deterministic",
    "nnpack_enabled",
    "cublas_allow_fp16_accumulation",
    "cublas_allow_fp16_reduced_precision_reduction",
    "cublas_allow_bf16_reduced_precision_reduction",
    "math_sdp_allow_fp16_bf16_reduction",
    "sdp_priority_order",
)
_KERNELS_OF_ATTENTION = ("flash", "mem_efficient", "math", "cudnn", "overrideable", "fa3")
_PRECISIONS = (  # a general one first: the others follow it unless they are set
    ("generic", "all"),
    *((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("all", "matmul", "conv", "rnn")),
)


def switched() -> Switched:
    """Return how they stand now."""
    return [*map(_call, _READS)]


@contextmanager
def switched_as(found: Switched) -> Iterator[None]:
    """Within this context, they stand as ``switched`` has found them."""
    before = switched()
    _switch(found)
    try:
        yield
    finally:
        _switch(before)


def _switch(found: Switched) -> None:
    for (read, write), value in zip(_SWITCHES, found, strict=True):
        if read() != value:
            write(value)


def _write(setter: Callable[..., object], value: Any) -> None:
    if isinstance(value, tuple):  # of several switches
        setter(*value)
    else:
        setter(value)


def _switches() -> Iterator[tuple[Callable[[], object], Callable[[Any], object]]]:
    c: Any = torch._C
    yield torch.get_default_dtype, torch.set_default_dtype
    is_deterministic, only_warns = c._get_deterministic_algorithms, c._get_deterministic_algorithms_warn_only
    yield is_deterministic, lambda value: c._set_deterministic_algorithms(value, warn_only=only_warns())
    yield only_warns, lambda value: c._set_deterministic_algorithms(is_deterministic(), warn_only=value)
    names = [(f"_get_{name}", f"_set_{name}") for name in _OF_BACKENDS]
    names += [(f"_get_{kernel}_sdp_enabled", f"_set_sdp_use_{kernel}") for kernel in _KERNELS_OF_ATTENTION]
    for getter, setter in names:
        if hasattr(c, getter) and hasattr(c, setter):
            yield getattr(c, getter), partial(_write, getattr(c, setter))
    if hasattr(c, "_get_fp32_precision_getter"):
        for place in _PRECISIONS:
            yield partial(c._get_fp32_precision_getter, *place), partial(c._set_fp32_precision_setter, *place)


_SWITCHES = [*_switches()]
_READS = [partial(read) for read, _ in _SWITCHES]
_call: Any = partial.__call__  # at C speed in map
