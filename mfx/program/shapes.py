"""Shapes of a graph's values, found on fake tensors without running or changing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.captured import Captured
from mfx.capture.symbolic.user_code import is_interrupt, is_own_fault, own_fault
from mfx.engine import Stream, streams_of
from mfx.modules.aside import aside
from mfx.modules.kept_results import results_not_kept
from mfx.modules.tree_copy import tree_copy
from mfx.options.options import Options
from mfx.program.rewritten import RewrittenGraph
from mfx.program.scope import Scope
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
    """Find chains in a graph with shapes; return None if shapes cannot be found without running the model."""
    graph, _ = captured.copy()
    with aside(net), results_not_kept(net), torch.no_grad():
        try:
            with compat.fake_mode() as mode:
                whole = undivided(net)
                shadow = shadow_of(net, lambda tensor: mode.from_tensor(whole(tensor)))
                fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
                modules = {name: tree_copy(module, mode.from_tensor) for name, module in captured.modules.items()}
                root = Scope(modules, shadow)
                captured.binding.function(_Shapes(root, graph).run)(shadow, *fake_args, **fake_kwargs)
        except BaseException as error:  # any failure on fake tensors may be none on real ones
            if is_interrupt(error):
                raise
            if is_own_fault(error):
                raise own_fault(error, net) from error
            return None
        return find_chains(graph, captured.modules_of(net), replace(options.selection, refused=refused or {}))


def shadow_of(net: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a copy of a net, without hooks, in which ``fake`` replaces every tensor."""
    shadow = tree_copy(net, fake)
    for inner in shadow.modules():
        for table in compat.forward_hook_tables(inner):
            table.clear()
    return shadow


def undivided(net: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes a shard as large as all shards together, in the dtype that the net computes in.

    Without hooks a net needs those; other tensors stay as they are.
    """
    dtype = compat.dtype_inside(net)

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        if not compat.is_sharded(tensor):
            return tensor
        is_cast = dtype is not None and tensor.is_floating_point()
        return torch.empty(
            tensor.shape,
            dtype=dtype if is_cast else tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )

    return whole


class _Shapes(fx.Interpreter):
    """Runs a graph and stores the value of every node in its ``meta``."""

    def __init__(self, root: Any, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


def stream_shapes(
    net: nn.Module,
    options: Options,
    rewritten: RewrittenGraph,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, tuple[Stream, ...]]:
    """Return the streams of each chain for these inputs, by chain name; empty if shapes cannot be found."""
    if rewritten.captured.values:  # captured with shapes
        return _at_start(rewritten.findings(net, options))
    found = find_with_shapes(net, rewritten.captured, options, args, kwargs, rewritten.refused)
    return {} if found is None else _at_start(found)


def _at_start(findings: Findings) -> dict[str, tuple[Stream, ...]]:
    found: dict[str, tuple[Stream, ...]] = {}
    for chain in findings.chains:
        values = [start.meta.get("val") for start in chain.starts]
        if all(isinstance(value, Tensor) for value in values):
            writes = [[update.stream for update in step.updates] for step in chain.steps]
            found[chain.name] = tuple(streams_of(values, writes))
    return found
