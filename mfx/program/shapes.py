"""Look at the shapes of a graph's values without computing them, and without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.captured import Captured
from mfx.modules.tree_copy import tree_copy
from mfx.options.options import Options
from mfx.program.chain_call import Stream
from mfx.program.rewritten import RewrittenGraph
from mfx_passes import Findings, find_chains
from mfx_passes.ir import Grounds


def find_with_shapes(
    net: nn.Module,
    captured: Captured,
    options: Options,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    refused: Mapping[str, Grounds] | None = None,
) -> Findings | None:
    """Return what is found in a graph once shapes are known; None if they cannot be had without running the model."""
    graph, _ = captured.copy()
    try:
        with compat.fake_mode() as mode:
            shadow = shadow_of(net, lambda tensor: mode.from_tensor(undivided(tensor)))
            fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            captured.binding.function(_Shapes(shadow, graph).run)(shadow, *fake_args, **fake_kwargs)
    except Exception:  # whatever goes wrong on tensors without values may go well on real ones
        return None
    return find_chains(graph, captured.modules_of(net), replace(options.selection, refused=refused or {}))


def shadow_of(net: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of a net, without hooks, in which every tensor is what ``fake`` makes of it."""
    shadow = tree_copy(net, fake)
    for inner in shadow.modules():
        for table in compat.forward_hook_tables(inner):
            table.clear()
    return shadow


def undivided(tensor: torch.Tensor) -> torch.Tensor:
    """As large as the tensor whose shards several processes hold; without the hooks they are not used as shards."""
    if not compat.is_sharded(tensor):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the value of every node."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


def stream_shapes(
    net: nn.Module,
    options: Options,
    entry: RewrittenGraph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Stream]:
    """Shape and dtype of each chain's state for these inputs, by chain name; empty where they cannot be had."""
    if entry.captured.values:  # captured with shapes
        return _at_start(entry.findings(net, options))
    found = find_with_shapes(net, entry.captured, options, args, kwargs, entry.refused)
    return {} if found is None else _at_start(found)


def _at_start(findings: Findings) -> dict[str, Stream]:
    starts = {chain.name: chain.start.meta.get("val") for chain in findings.chains}
    return {name: (tuple(value.shape), value.dtype) for name, value in starts.items() if isinstance(value, Tensor)}
