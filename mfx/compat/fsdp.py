"""Parameters sharded by FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """True if ``tensor`` is a DTensor, which FSDP2 swaps for plain tensors while it computes (torch 2.13 to 2.15)."""
    return hasattr(tensor, "device_mesh")


def may_be_sharded() -> bool:
    """True if FSDP2 was imported, so that modules may be sharded."""
    return "torch.distributed.fsdp" in sys.modules


def reads_in_parts(found: Sequence[Any], around: Sequence[nn.Module]) -> bool:
    """True if processes compute with parts of parameters on streams that they all have: tensor parallelism.

    FSDP2's shards are none: they are gathered first. They may be shards of such parts (torch 2.13 to 2.15).

    Args:
        found: modules and tensors that are read.
        around: modules whose shards may be those of tensors in these.
    """
    modules = [module for value in found if isinstance(value, nn.Module) for module in value.modules()]
    gathered = {
        id(param.sharded_param): param.is_dtensor
        for module in (*modules, *around)
        if (shards := shards_of(module)) is not None
        for group in shards._fsdp_param_groups
        for param in group.fsdp_params
    }
    tensors = [value for value in found if isinstance(value, Tensor)]
    tensors += [param for module in modules for param in module._parameters.values() if param is not None]
    return any(gathered.values()) or any(is_sharded(tensor) and id(tensor) not in gathered for tensor in tensors)


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


def is_sharding_hook(hook: Any) -> bool:
    """True if a module's hook is FSDP2's own (torch 2.13 to 2.15)."""
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def enter_sharded(module: nn.Module, inputs: T) -> T:
    """Do what FSDP2 does before the forward of a sharded module (torch 2.14).

    Args:
        module: the module. Its parameters are whole afterwards.
        inputs: a tuple of all that its forward reads. When the gradients of these are there, those of the parameters
            are reduced.

    Returns:
        The inputs as the forward has to read them.
    """
    handed: tuple[T, dict[str, Any]] = shards_of(module)._pre_forward(module, inputs, {})
    return handed[0]


def leave_sharded(module: nn.Module, outputs: Iterable[Tensor]) -> None:
    """Do what FSDP2 does after the forward of a sharded module (torch 2.14).

    Args:
        module: the module.
        outputs: tensors, of which one gets the first gradient that goes into the module: its parameters are gathered.
    """
    shards = shards_of(module)
    shards._post_forward(module, (), ())
    if torch.is_grad_enabled():
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(shards._pre_backward)


def dtype_inside(net: nn.Module) -> torch.dtype | None:
    """Return the dtype that FSDP2 casts a net's parameters to, None if it casts them to none (torch 2.14)."""
    shards = shards_of(net)
    dtype: torch.dtype | None = None if shards is None else shards._mp_policy.param_dtype
    return dtype


def cast_inputs(module: nn.Module, inputs: T) -> T:
    """Return inputs in the dtype that FSDP2's policy has a module compute in (torch 2.14)."""
    cast: tuple[T, dict[str, Any]] = shards_of(module)._cast_forward_inputs(inputs, {})
    return cast[0]


def cast_output(module: nn.Module, outputs: T) -> T:
    """Return outputs in the dtype that FSDP2's policy has a module return (torch 2.14)."""
    cast: T = shards_of(module)._cast_output_dtype(outputs)
    return cast


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within this context a sharded module has whole parameters, gathered now if they are not (torch 2.14)."""
    sharded: Any = module
    whole = all(group.is_unsharded for group in shards_of(module)._fsdp_param_groups)
    if not whole:
        sharded.unshard()
    try:
        yield
    finally:
        if not whole:
            sharded.reshard()
