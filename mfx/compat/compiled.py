"""What torch.compile returns, recognized without importing TorchDynamo."""

from __future__ import annotations

import sys

from torch import nn


def compiled_model(module: nn.Module) -> nn.Module | None:
    """The model that ``torch.compile`` made this module of; None if it is no such module (torch 2.11 to 2.15)."""
    dynamo = sys.modules.get("torch._dynamo")  # whoever has compiled something has imported it
    return module._orig_mod if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def is_inductor(backend: object) -> bool:
    """Whether a backend of torch.compile, or its name, is Inductor; torch.compile itself names it so (2.11 to 2.14)."""
    return getattr(backend, "compiler_name", backend) == "inductor"
