"""Privates of torch.fx: its tracer and its nodes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import fx, nn
from torch.fx import _symbolic_trace

from mfx.compat.aside import without_global_hooks
from mfx.compat.fake_tensors import unlogged
from mfx.compat.modes import modes_unobserved, without_function_modes
from mfx.compat.patching import patched


def search_autowrapped_in(tracer: fx.Tracer, module: ModuleType) -> None:
    """Have a tracer look for the functions that it wraps in ``module``, too (torch 2.11 to 2.15)."""
    tracer._autowrap_search.append(module)


def is_erased(node: fx.Node) -> bool:
    """True if a node is no longer part of its graph (torch 2.11 to 2.15)."""
    return node._erased


def records_calls() -> bool:
    """True if a symbolic trace records calls of modules, outside of `untraced` (torch 2.11 to 2.15)."""
    return nn.Module.__call__ is not _symbolic_trace._orig_module_call


@contextmanager
def untraced() -> Iterator[None]:
    """Within this context, modules run as they do outside of the symbolic trace that is going on (torch 2.11 to 2.15).

    The modes that watch the trace do not see it, nor do hooks on all modules; what fails on fake tensors is not logged.
    """
    with (
        patch.object(nn.Module, "__call__", _symbolic_trace._orig_module_call),
        patch.object(nn.Module, "__getattr__", _symbolic_trace._orig_module_getattr),
        without_function_modes(),
        without_global_hooks(),
        modes_unobserved(),
        unlogged(),
    ):
        yield


def autowrap_in_this_thread(
    type_seen: type, replaced: Mapping[Callable[..., Any], Callable[..., Any]]
) -> AbstractContextManager[None]:
    """Have a tracer wrap functions for this thread's calls only: a call of a module elsewhere changes no namespace.

    Read in torch 2.11 to 2.15.

    Args:
        type_seen: what the namespaces of the model's code have for the builtin ``type`` in the meantime.
        replaced: functions, with what these namespaces have in their place.
    """
    module = _symbolic_trace
    original = module._autowrap_check
    others = {id(function): other for function, other in replaced.items()}

    def check(patcher: Any, namespace: dict[str, Any], function_ids: set[int]) -> None:
        is_new = id(namespace) not in patcher.visited
        original(patcher, namespace, function_ids)
        for name in [name for name, value in namespace.items() if id(value) in others] if is_new and others else ():
            patcher.patch(namespace, name, others[id(namespace[name])])
        if "type" not in namespace and str(namespace.get("__name__")).partition(".")[0] not in ("torch", "mfx"):
            patcher.patch(namespace, "type", type_seen)

    return patched(module, "_autowrap_check", check, elsewhere=lambda *args: None)


@contextmanager
def dynamo_rules_kept() -> Iterator[None]:
    """Within this context functions of torch may be wrapped: TorchDynamo keeps no table with one of them.

    It knows functions and classes by identity (torch 2.14), with ``torch.finfo`` among them. So it is imported before,
    as a first call of a net does in any case; its largest table, if made here, is not kept.
    """
    importlib.import_module("torch._dynamo")
    was_made = _are_rules_made()
    try:
        yield
    finally:
        if not was_made and _are_rules_made():
            sys.modules["torch._dynamo.trace_rules"].get_torch_obj_rule_map.cache_clear()


def _are_rules_made() -> bool:
    rules = sys.modules.get("torch._dynamo.trace_rules")
    return rules is not None and rules.get_torch_obj_rule_map.cache_info().currsize > 0
