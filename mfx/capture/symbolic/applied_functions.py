"""Custom autograd functions as nodes of a symbolic trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch.fx.node import map_aggregate

from mfx import compat


class AppliedFunction:
    """The target of a node that applies an autograd function.

    Args:
        function: the function's class.
    """

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        return self.function.apply(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return applied, (self.function,)


@cache
def applied(function: type[torch.autograd.Function]) -> AppliedFunction:
    """Return the target of nodes that apply a function; one for all nodes, so that equal blocks have equal graphs."""
    return AppliedFunction(function)


@contextmanager
def functions_are_nodes() -> Iterator[None]:
    """Within this context, an autograd function that is applied to proxies becomes a node."""
    own: classmethod[Any, Any, Any] = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        found: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda arg: found.append(arg) if isinstance(arg, fx.Proxy) else arg)
        if not found:
            return own.__get__(None, cls)(*args, **kwargs)
        if _writes(cls.forward) or _writes(cls.setup_context):
            raise TypeError(f"{cls.__name__} is an autograd function that changes its arguments in place")
        return found[0].tracer.create_proxy("call_function", applied(cls), args, kwargs, name=cls.__name__.lower())

    with compat.patching(), patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield


def _writes(function: Callable[..., Any]) -> bool:
    """True if a method of an autograd function says that it changes its arguments."""
    code = getattr(function, "__code__", None)
    return code is not None and "mark_dirty" in code.co_names
