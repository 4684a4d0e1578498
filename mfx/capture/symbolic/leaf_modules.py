"""Functions and modules that a symbolic trace calls as a whole, and those of torch.nn that it walks through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

# torch.nn is opaque to a tracer, which is right for all but the modules that hold residual adds themselves.
LOOKED_INTO = (
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
# Functions of torch that do not take symbolic values by themselves: dtypes, sizes.
TORCH_FUNCTIONS = (torch.finfo, torch.iinfo, torch.zeros, torch.ones, torch.empty, torch.full)
_EINOPS_FUNCTIONS = ("rearrange", "reduce", "repeat", "einsum", "asnumpy", "parse_shape")


def einops_functions() -> tuple[Callable[..., Any], ...]:
    """Return the functions of einops, which read sizes."""
    einops = sys.modules.get("einops")
    return tuple(getattr(einops, name) for name in _EINOPS_FUNCTIONS if hasattr(einops, name)) if einops else ()


def timm_functions() -> tuple[Callable[..., Any], ...]:
    """Return the functions that timm declares to be untraceable, because they read sizes."""
    timm = sys.modules.get("timm.layers")
    return tuple(f for f in timm.get_notrace_functions() if callable(f)) if timm else ()


def timm_modules() -> frozenset[type[nn.Module]]:
    """Return the modules that timm declares to be untraceable, at least in some of their configurations."""
    timm = sys.modules.get("timm.layers")
    return frozenset(timm.get_notrace_modules()) if timm else frozenset()


def is_looked_into(module: nn.Module) -> bool:
    """True for a module of torch.nn that a trace walks through."""
    # The class of a parametrized module was made by torch.nn, maybe from one that was not.
    is_made = is_parametrized(module) and not type(module).__mro__[1].__module__.startswith("torch.nn")
    return is_made or type(module) in LOOKED_INTO
