"""Tables of the hooks on modules, by which hooks can be listed, compared and taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType
from typing import Any

from torch import nn
from torch.nn.modules import module as every
from torch.utils.hooks import RemovableHandle


def forward_hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return a module's own hooks before and after its forward, by number (torch 2.11 to 2.15)."""
    return module._forward_pre_hooks, module._forward_hooks


def call_code() -> CodeType:
    """Return the code that every call of a module runs, with the module as ``self`` (torch 2.11 to 2.15)."""
    return nn.Module._call_impl.__code__


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return a module's own hooks, of all kinds that surround a call of it, by number (torch 2.11 to 2.15)."""
    return *forward_hook_tables(module), module._backward_hooks, module._backward_pre_hooks


def call_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return all tables that a call of a module looks hooks up in (torch 2.11 to 2.15).

    Those that say how a hook is called are asked for the hooks that there are: without one they are not among these.
    """
    pre, post = forward_hook_tables(module)
    flags_of_pre = [module._forward_pre_hooks_with_kwargs] if pre else []
    flags_of_post = [module._forward_hooks_with_kwargs, module._forward_hooks_always_called] if post else []
    return *hook_tables(module), *flags_of_pre, *flags_of_post


def global_call_tables() -> tuple[dict[int, Any], ...]:
    """Return all tables that a call of any module looks hooks up in (torch 2.11 to 2.15)."""
    return tuple(getattr(every, name) for name in _GLOBAL)


def global_hooks() -> list[Any]:
    """Return the hooks on all modules, but for those by which torch's own observers follow them (torch 2.11 to 2.15).

    TorchDynamo traces into them, and guards none of their tables.
    """
    return [hook for table in global_call_tables() for hook in without_closed_observers(table, {}).values()]


def without_closed_observers(hooks: Mapping[int, Any], now: Mapping[int, Any]) -> dict[int, Any]:
    """Return hooks without those of torch's own observers that are not open now.

    A closed ModuleTracker (FlopCounterMode has one) would leave hooks on the leaves of the graph (torch 2.11 to 2.15).

    Args:
        hooks: global hooks as they were.
        now: the same table as it is.
    """
    return {number: hook for number, hook in hooks.items() if number in now or not _is_of_torch(hook)}


def _is_of_torch(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None)).partition(".")[0] == "torch"


_GLOBAL = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def has_state_dict_hook(module: nn.Module, hook: Callable[..., Any]) -> bool:
    """True if a module's ``state_dict`` calls a hook (torch 2.11 to 2.15)."""
    return hook in module._state_dict_hooks.values()


def put_load_hook_first(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a hook that runs before a module's other hooks on ``load_state_dict`` (torch 2.11 to 2.15)."""
    handle: RemovableHandle = module.register_load_state_dict_pre_hook(hook)
    hooks: Any = module._load_state_dict_pre_hooks
    hooks.move_to_end(handle.id, last=False)
    return handle
