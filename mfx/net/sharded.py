"""Nets whose parameters ``torch.distributed.fsdp.fully_shard`` spreads over processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mfx import compat
from mfx_passes import MfxError, paths


def is_sharded_somewhere(net: nn.Module) -> bool:
    """True if ``fully_shard`` was applied to the net or to a module in it."""
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
    """Refuse sharded modules that are neither called nor a run of whole steps: nothing would gather their parameters.

    Args:
        net: a momentumized net.
        containers: paths of modules that are neither.
        read: paths of what the steps of its chains read.

    Raises:
        MfxError: one of them is sharded.
    """
    for path in containers:
        if compat.shards_of(net.get_submodule(path)) is not None:
            inside = [target for target in read if paths.is_inside(target, path) and _has_parameters(net, target)]
            raise MfxError(
                f"fully_shard was applied to {path}, which is not called, since steps of a momentum chain lie in it, "
                "and is more than a run of them: nothing would gather its parameters. Apply it to what the steps call: "
                f"{', '.join(dict.fromkeys(inside)) or 'modules inside one branch'}."
            )


def _has_parameters(net: nn.Module, path: str) -> bool:
    modules = dict(net.named_modules())
    return path in modules and any(True for _ in modules[path].parameters())
