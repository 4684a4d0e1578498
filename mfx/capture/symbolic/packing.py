"""Calls of ``einops.pack`` and ``unpack`` on traced values, recorded as the operations that they are made of."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import prod  # which a trace replaces in its module
from types import ModuleType
from typing import Any

import torch
from torch import fx

from mfx_passes.ops.packing import merged, parted


def packing_functions() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return what to call in the place of functions of einops; nothing if that was not imported."""
    packing = sys.modules.get("einops.packing")
    return {} if packing is None else {packing.pack: _pack, packing.unpack: _unpack}


def packing_namespaces() -> Sequence[ModuleType]:
    """Return the modules whose attributes these functions are: ``einops``, if that was imported."""
    return [sys.modules["einops"]] if packing_functions() else []


def _pack(tensors: Any, pattern: Any) -> Any:
    place, values = _place(pattern), _as_list(tensors)
    if place is None or not values or not any(isinstance(value, fx.Proxy) for value in values):
        return _recorded("pack", tensors, pattern)
    before, after = place
    shapes = [value.shape[before : -after or None] for value in values]
    return torch.cat([_call(merged, value, before, after) for value in values], dim=before), shapes


def _unpack(tensor: Any, packed_shapes: Any, pattern: Any) -> Any:
    place, shapes = _place(pattern), _as_list(packed_shapes)
    if place is None or not shapes or not isinstance(tensor, fx.Proxy):
        return _recorded("unpack", tensor, packed_shapes, pattern)
    before, after = place
    if len(shapes) == 1:
        return [_call(parted, tensor, before, after, shapes[0])]
    if any(map(_is_open, shapes)):
        return _recorded("unpack", tensor, packed_shapes, pattern)
    ends = [*accumulate(_call(prod, shape) for shape in shapes[:-1])]
    cuts = [slice(*cut) for cut in zip([0, *ends], [*ends, None], strict=True)]
    pieces = [operator.getitem(tensor, (slice(None),) * before + (cut,)) for cut in cuts]
    return [_call(parted, piece, before, after, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _place(pattern: Any) -> tuple[int, int] | None:
    """Return how many dimensions are before and behind the star of a pattern; None if it is not one for einops."""
    axes = pattern.split() if isinstance(pattern, str) else []
    return (axes.index("*"), len(axes) - axes.index("*") - 1) if axes.count("*") == 1 else None


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) and not isinstance(values, fx.Proxy) else []


def _is_open(shape: Any) -> bool:
    """True if the lengths of a shape are not all given."""
    if isinstance(shape, fx.Proxy):
        return False
    return not isinstance(shape, Sequence) or any(type(length) is int and length == -1 for length in shape)


def _call(function: Callable[..., Any], value: Any, *args: Any) -> Any:
    traced = next((each for each in (value, *args) if isinstance(each, fx.Proxy)), None)
    return (
        function(value, *args)
        if traced is None
        else traced.tracer.create_proxy("call_function", function, (value, *args), {})
    )


def _recorded(name: str, *args: Any) -> Any:
    """Call a function of einops, or record the call as a whole."""
    function = getattr(sys.modules["einops.packing"], name)
    found: list[fx.Proxy] = []
    fx.node.map_aggregate(args, lambda value: found.append(value) if isinstance(value, fx.Proxy) else None)
    return found[0].tracer.create_proxy("call_function", function, args, {}) if found else function(*args)
