"""Parameters sharded by FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """True if ``tensor`` is a DTensor, which FSDP2 swaps for plain tensors while it computes (torch 2.13 to 2.15)."""
    return hasattr(tensor, "device_mesh")


def shards_of(module: nn.Module) -> Any:
    """Return the state that ``fully_shard`` keeps of ``module``, None if it was not applied (torch 2.13 to 2.15)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported before anything can be sharded
    return module._get_fsdp_state() if fsdp is not None and isinstance(module, fsdp.FSDPModule) else None


def class_before_sharding(module: nn.Module) -> type:
    """Return the class that ``module`` had before ``fully_shard`` (torch 2.13 to 2.15)."""
    sharded, _, before, *_ = type(module).__mro__
    assert sharded.__bases__[1] is before
    return before


def is_group(shards: Any) -> bool:
    """True if several modules were sharded in one call (torch 2.13 to 2.15)."""
    return len(shards._modules) > 1


def share_shards(module: nn.Module, copied: nn.Module, copies: Mapping[int, Any]) -> None:
    """Give ``copied`` the shards of ``module``, as modules that share parameters have them (torch 2.13 to 2.15).

    Args:
        module: a module that `fully_shard` was applied to by itself.
        copied: its copy.
        copies: the copies of the modules inside, by identity of the module.
    """
    from torch.distributed._composable_state import _insert_module_state

    shards = shards_of(module)
    copied.__class__ = type(module)
    _insert_module_state(copied, shards)
    for group in shards._fsdp_param_groups:
        for info in (param._module_info for param in group.fsdp_params):
            holders = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            for holder, name in holders:
                if id(holder) in copies:
                    info.shared_modules.append(copies[id(holder)])
                    info.shared_param_names.append(name)
