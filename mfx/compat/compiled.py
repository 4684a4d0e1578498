"""Compiled models and Inductor, recognized without importing TorchDynamo."""

from __future__ import annotations

import sys

from torch import nn


def compiled_model(module: nn.Module) -> nn.Module | None:
    """Return the model inside a module that ``torch.compile`` returned; None for other modules (torch 2.11 to 2.15)."""
    dynamo = sys.modules.get("torch._dynamo")  # imported before anything can be compiled
    return module._orig_mod if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def is_compiled(module: nn.Module) -> bool:
    """True if a call of a module runs what ``torch.compile`` or its ``compile()`` made of it (torch 2.11 to 2.15)."""
    return module._compiled_call_impl is not None or compiled_model(module) is not None


def is_inductor(backend: object) -> bool:
    """True if a backend of torch.compile, or its name, is Inductor's (torch 2.11 to 2.14)."""
    return getattr(backend, "compiler_name", backend) == "inductor"
