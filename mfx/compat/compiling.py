"""Privates of torch.compile that are needed while it compiles the code around chains.

All were read in torch 2.13 to 2.14.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import fx, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, LocalSource
from torch.utils import _pytree as pytree


def called_as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that Dynamo calls on fake tensors and records in its graph as one call."""
    return torch._dynamo.nonstrict_trace(torch._dynamo.disable(function))


def has_fake(values: Any) -> bool:
    """True if there are fake tensors among these values: they are a compiler's, not a computation's."""
    return torch._guards.detect_fake_mode(pytree.tree_leaves(values)) is not None


def backend() -> Any:
    """Return the backend for which Dynamo is making a graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return original_backend(InstructionTranslator.current_tx().output.compiler_fn)


def original_backend(made: Any) -> Any:
    """Return the backend that Dynamo has wrapped, several times perhaps."""
    while hasattr(made, "_torchdynamo_orig_backend"):
        made = made._torchdynamo_orig_backend
    return made


def backends(*, hidden: bool = False) -> list[str]:
    """Return the names of the backends of torch.compile; with ``hidden``, those for debugging too."""
    return list(torch._dynamo.list_backends(exclude_tags=()) if hidden else torch._dynamo.list_backends())


def compiled_module() -> tuple[str, nn.Module] | None:
    """Return the module whose forward Dynamo is compiling, and what its author calls it there, mostly ``self``."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        variables = InstructionTranslator.current_tx().f_locals
    except (AttributeError, IndexError):
        return None
    # After a graph break the variables are the same, but no longer the first of the function.
    return next(((name, value) for name, value in variables.items() if _is_self(name, value)), None)


def _is_self(name: str, value: Any) -> bool:
    if not isinstance(value, nn.Module):
        return False
    code = getattr(inspect.unwrap(type(value).forward), "__code__", None)
    return code is not None and code.co_varnames[:1] == (name,)


def source_of_compiled() -> Any:
    """Return Dynamo's source of the module whose forward it is compiling; None if that is a function."""
    found = compiled_module()
    return None if found is None else LocalSource(found[0])


def guarded_training(source: Any) -> bool:
    """Return the training flag of a module, and have what is compiled now hold for that flag only.

    Args:
        source: Dynamo's, of the module.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    flag = AttrSource(source, "training")
    install_guard(flag.make_guard(GuardBuilder.CONSTANT_MATCH))
    output = InstructionTranslator.current_tx().output
    name = flag.name() if callable(flag.name) else flag.name
    return bool(eval(name, {"L": output.local_scope, "G": output.global_scope}))


def mode_of_compiled() -> str:
    """Return the mode of the module that Dynamo is compiling, ``"train"`` or ``"eval"``; ``"graph"`` for a function."""
    found = compiled_module()
    return "graph" if found is None else "train" if found[1].training else "eval"


def is_broken_off(module: fx.GraphModule) -> bool:
    """True if Dynamo ended a graph at a graph break, not because the function returned."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def is_resumed() -> bool:
    """True if the function that Dynamo is compiling is the rest of one, after a graph break."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code = InstructionTranslator.current_tx().f_code
    except (AttributeError, IndexError):
        return False
    return code.co_name.startswith("torch_dynamo_resume_in_")


def recompilations_left() -> int:
    """Return the number of graphs that Dynamo will still make of the function that it is compiling."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    made = 0 if compile_id is None or compile_id.frame_compile_id is None else compile_id.frame_compile_id
    return torch._dynamo.config.recompile_limit - made - 1
