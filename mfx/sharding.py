"""Nets whose parameters ``torch.distributed.fsdp.fully_shard`` spreads over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from mfx import compat
from mfx_passes import MfxError

__all__ = ["copying", "is_sharded_somewhere", "refuse_containers", "refuse_shards", "share"]


@contextmanager
def copying(model: nn.Module) -> Iterator[None]:
    """Within this context the sharded modules of ``model`` can be deep-copied, as modules that are not sharded."""
    sharded = {module: type(module) for module in model.modules() if compat.shards_of(module) is not None}
    try:
        for module in sharded:
            module.__class__ = compat.class_before_sharding(module)
        yield
    finally:
        for module, kind in sharded.items():
            module.__class__ = kind


def share(model: nn.Module, copies: Mapping[int, Any]) -> None:
    """Have the copies of sharded modules be sharded with them: whatever is gathered for one is there for both.

    Args:
        model: the model that was copied.
        copies: the copies of its modules, by identity of the module.

    Raises:
        MfxError: ``fully_shard`` was given several modules at once.
    """
    for path, module in model.named_modules():
        shards = compat.shards_of(module)
        if shards is None:
            continue
        if compat.is_group(shards):
            raise MfxError(
                f"fully_shard was given several modules at once, {path} among them, and which of them have run is "
                "known to it by the module. Apply it to one module at a time, or to the momentumized net."
            )
        compat.share_shards(module, copies[id(module)], copies)


def is_sharded_somewhere(net: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the net or to a module in it."""
    return any(compat.shards_of(module) is not None for module in net.modules())


def refuse_shards(net: nn.Module) -> None:
    """Refuse sharded modules in a net whose graphs read parameters without calling the modules that have them.

    Raises:
        MfxError: there is one.
    """
    for path, module in net.named_modules():
        if compat.shards_of(module) is not None and path:
            raise MfxError(
                f"{path} is sharded by fully_shard, which gathers its parameters when it is called; but "
                f"{type(net).__name__} has to be captured by TorchDynamo, whose graphs read parameters without calling "
                "modules. Shard the net as a whole, or use a model that symbolic tracing can follow."
            )


def refuse_containers(net: nn.Module, containers: Sequence[str], read: Sequence[str]) -> None:
    """Refuse sharded modules that are not called as a whole, whose parameters therefore nobody would gather.

    Args:
        net: a momentumized net.
        containers: paths of modules that are not called as a whole.
        read: paths of what the steps of its chains read.

    Raises:
        MfxError: one of them is sharded.
    """
    for path in containers:
        if compat.shards_of(net.get_submodule(path)) is not None:
            inside = [target for target in read if target.startswith(f"{path}.") and _has_parameters(net, target)]
            raise MfxError(
                f"fully_shard was applied to {path}, which spans several steps of a momentum chain and is not called "
                "as a whole, so nothing would gather its parameters. Apply it to what the steps call instead: "
                f"{', '.join(dict.fromkeys(inside)) or 'modules inside one branch'}."
            )


def _has_parameters(net: nn.Module, path: str) -> bool:
    modules = dict(net.named_modules())
    return path in modules and any(True for _ in modules[path].parameters())
