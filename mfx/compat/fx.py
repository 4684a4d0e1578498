"""Privates of torch.fx: its tracer and its nodes."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any, cast
from unittest.mock import patch

from torch import fx, nn
from torch.fx import _symbolic_trace

from mfx.compat.aside import without_global_hooks
from mfx.compat.fake_tensors import unlogged
from mfx.compat.modes import modes_unobserved, without_function_modes
from mfx.compat.patching import patched


def search_autowrapped_in(tracer: fx.Tracer, namespace: dict[str, Any]) -> None:
    """Have a tracer look for the functions that it wraps in the variables of a module, too (torch 2.11 to 2.15)."""
    tracer._autowrap_search.append(cast(ModuleType, _Holding(namespace)))


class _Holding:
    """An object whose attributes are the variables of a module."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.__dict__ = namespace


def methods_of(cls: type[fx.Proxy]) -> type:
    """Return a class with the methods of a class of proxies that is not derived from it (torch 2.11 to 2.15).

    Without ``keys``, which a value has not, if it is a tensor.
    """
    left_out = ("__dict__", "__weakref__", "keys")
    return type(cls.__name__, (), {name: value for name, value in vars(cls).items() if name not in left_out})


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
    seen: Mapping[str, Any], replaced: Mapping[Callable[..., Any], Callable[..., Any]]
) -> AbstractContextManager[None]:
    """Have a tracer wrap functions for this thread's calls only: a call of a module elsewhere changes no namespace.

    Read in torch 2.11 to 2.15.

    Args:
        seen: what the model's code has for builtins in the meantime, by name.
        replaced: functions, with what these namespaces have in their place.
    """
    module = _symbolic_trace
    original = module._autowrap_check
    others = {id(function): other for function, other in replaced.items()}
    stand_in = ModuleType(builtins.__name__)
    vars(stand_in).update({**vars(builtins), **seen})
    of_model = {**others, id(builtins): stand_in, **{id(getattr(builtins, name)): seen[name] for name in seen}}

    def check(patcher: Any, namespace: dict[str, Any], function_ids: set[int]) -> None:
        is_new = id(namespace) not in patcher.visited
        original(patcher, namespace, function_ids)
        if not is_new:
            return
        is_of_model = str(namespace.get("__name__")).partition(".")[0] not in ("torch", "mfx")
        here = of_model if is_of_model else others
        for name in [name for name, value in namespace.items() if id(value) in here and name != "__builtins__"]:
            patcher.patch(namespace, name, here[id(namespace[name])])
        for name in seen.keys() - namespace.keys() if is_of_model else ():
            patcher.patch(namespace, name, seen[name])

    return patched(module, "_autowrap_check", check, elsewhere=lambda *args: None)


_NAMES = ("is_fx_tracing", "is_fx_symbolic_tracing")
_ASKED = tuple(getattr(_symbolic_trace, name) for name in _NAMES if hasattr(_symbolic_trace, name))


@contextmanager
def trace_hidden() -> Iterator[None]:
    """Within this context, torch.fx tells torch's own code alone that this thread traces (torch 2.11 to 2.15)."""
    with ExitStack() as stack:
        for function in _ASKED:
            stack.enter_context(patched(_symbolic_trace, function.__name__, partial(_answer, function)))
        yield


def trace_hidden_from() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the functions that say whether torch.fx traces, with what a model's code is to have in their place."""
    return dict.fromkeys(_ASKED, lambda: False)


def _answer(function: Callable[[], bool]) -> bool:
    asking = str(sys._getframe(2).f_globals.get("__name__"))  # behind the one of the patch
    return function() if asking.startswith("torch.") else False


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
