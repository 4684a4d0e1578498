"""Privates of torch.fx: its tracer and its nodes."""

from __future__ import annotations

from types import ModuleType

from torch import fx


def search_autowrapped_in(tracer: fx.Tracer, module: ModuleType) -> None:
    """Have a tracer look for the functions that it wraps in ``module``, too (torch 2.11 to 2.15)."""
    tracer._autowrap_search.append(module)


def is_erased(node: fx.Node) -> bool:
    """True if a node is no longer part of its graph (torch 2.11 to 2.15)."""
    return node._erased
