"""Modules whose classes have a ``__call__`` of their own: what it does around the forward is part of the call.

torch.fx sees a call where it comes to ``nn.Module.__call__``, which is inside of theirs, maybe more than once or never.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from mfx import compat


@contextmanager
def own_calls_seen(
    root: nn.Module, call: Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Within this context, a trace sees the whole calls of such modules.

    Args:
        root: the module that is traced.
        call: takes a module that is called, what its class does for that, and the arguments; returns the result.
    """
    with ExitStack() as stack:
        for cls in {type(module) for module in root.modules()}:
            if cls.__call__ is not nn.Module.__call__:
                stack.enter_context(compat.patched(cls, "__call__", *_seen(cls, call)))
        yield


def _seen(cls: type[nn.Module], call: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what the trace calls in place of a class's own ``__call__``, and what is called in other threads."""
    own = inspect.getattr_static(cls, "__call__")
    bind = getattr(own, "__get__", lambda *owner: own)

    def run(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return bind(module, type(module))(*args, **kwargs)

    def see(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if type(module) is not cls or not compat.records_calls():  # called by the one of a class derived from it
            return run(module, *args, **kwargs)
        return call(module, partial(run, module), args, kwargs)

    return see, run
