"""Functions that TorchDynamo writes into a graph to enter and leave modes, by kind.

All were read in torch 2.11 to 2.14.
"""

from __future__ import annotations

import torch
import torch.nn.attention
from torch._functorch import predispatch

_IS_PREDISPATCH = hasattr(predispatch, "_enter_dual_level")  # from torch 2.13 on
_JVP = predispatch if _IS_PREDISPATCH else torch._C._functorch
_DUAL = predispatch if _IS_PREDISPATCH else torch._C

DIFFERENTIATIONS = (
    torch._C._functorch._grad_increment_nesting,
    _JVP._jvp_increment_nesting,
    _DUAL._enter_dual_level,
)
ENTRANCES = (
    torch.amp.autocast_mode._enter_autocast,
    torch.autograd.grad_mode._enter_inference_mode,
    predispatch._vmap_increment_nesting,
    *DIFFERENTIATIONS,
)
EXITS = (
    torch.amp.autocast_mode._exit_autocast,
    torch.autograd.grad_mode._exit_inference_mode,
    predispatch._vmap_decrement_nesting,
    torch._C._functorch._grad_decrement_nesting,
    _JVP._jvp_decrement_nesting,
    _DUAL._exit_dual_level,
)
HOOK_SWITCHES = (
    torch._C._autograd._saved_tensors_hooks_disable,
    torch._C._autograd._saved_tensors_hooks_enable,
)
SWITCHES = (torch._C._set_grad_enabled, torch.nn.attention._sdpa_kernel)  # the same function turns them on and off
