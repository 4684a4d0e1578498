"""Submodules of a net called by themselves: by its other methods, by its user, or as the net is not one graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from mfx.modules.overlay import Extra
from mfx.net.forward import NetForward
from mfx.net.graph_table import GraphTable
from mfx.options.options import Options
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.rewritten import RewrittenGraph
from mfx_passes import MfxError, paths


class Role(Enum):
    """The role of a submodule in the graphs of the net around it."""

    OWN = "holds whole chains"
    PIECE = "holds pieces of chains"
    UNKNOWN = "may hold a piece of a chain"
    NONE = "has nothing to do with chains, or lies in a branch"


class SubmoduleForward(NetForward):
    """The forward of a module inside a net, for calls that do not come from a rewritten graph.

    A submodule that holds whole chains runs them as the net does. One that holds a piece of a chain cannot, and warns.

    Args:
        net: the module.
        outer: the forward of the net, or of the submodule, that the module belongs to.
        path: the module's path in the net.
    """

    is_submodule = True

    def __init__(self, net: nn.Module, outer: NetForward, path: str) -> None:
        self.outer = outer
        self.path = path
        super().__init__(net, replace(outer.options, within=path, example_inputs=None))

    def _make_table(self, options: Options) -> GraphTable:
        return SubmoduleTable(self, options)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler = to_function) -> Any:
        """Run the module on these arguments."""
        outer = self.captured_outer()
        if self.bypassed or outer.bypassed or (role := self._role_in(outer)) is Role.NONE:
            return self._original()(*args, **kwargs)
        if role is Role.UNKNOWN:
            self._refuse_chains(outer, args, kwargs)
            return self._original()(*args, **kwargs)
        if role is Role.PIECE:
            self.warn(
                f"{self.path} was called by itself, outside of the net's forward, and computes what it did before it "
                "was rewritten: it holds but a piece of a chain. Call the net, or a part that holds whole chains."
            )
            return self._original()(*args, **kwargs)
        if not isinstance(self.options.velocity, str):
            raise MfxError(
                f"{self.path} was called by itself, and the modules that compute v0 are known to the whole net only. "
                "Call the net, or use velocity='zero' or 'residual'."
            )
        return super().run(args, kwargs, compiler)

    def _has_no_chain(self, graph: RewrittenGraph) -> None:
        self.per_module = True  # there is nothing to capture, whatever it is called with

    def captured_outer(self) -> NetForward:
        """Return the forward of the smallest captured module around this one, else the net's."""
        outer = self.outer
        while isinstance(outer, SubmoduleForward) and not outer.per_module and not outer.table.graphs:
            outer = outer.outer
        return outer

    def _role_in(self, outer: NetForward) -> Role:
        if outer.per_module:
            return Role.OWN
        graphs = [graph for graph in outer.table.graphs if graph.computes(self.path)]
        if not graphs:
            return self._role_before_capture(outer)
        chains = [sums for graph in graphs for sums in graph.sums.values()]
        held = [[paths.is_inside(path, self.path) for path in sums] for sums in chains]
        if any(any(sums) and not all(sums) for sums in held):
            return Role.PIECE if any(graph.changes_function for graph in graphs) else Role.NONE
        return Role.OWN if any(map(all, held)) else Role.NONE

    def _role_before_capture(self, outer: NetForward) -> Role:
        is_captured = bool(outer.table.graphs)  # but none of the graphs computes this module
        if is_captured or not self.path.rpartition(".")[2].isdigit() or self.options.gamma == 0:
            return Role.OWN
        return Role.UNKNOWN

    def _refuse_chains(self, outer: NetForward, args: Any, kwargs: Any) -> None:
        if self.table.graph_for(args, kwargs).calls:
            raise MfxError(
                f"{self.path} was called by itself before {type(outer.net).__name__} was captured, so it is not known "
                "which chain it belongs to. Call the net first, or give momentumize example_inputs."
            )

    def _show(self, graph: RewrittenGraph) -> None:
        self._shown.active = graph  # without attributes: a net shows the graphs of the whole


class SubmoduleTable(GraphTable):
    """The rewritten graphs of a module inside a net, whose chains are chains of the net.

    Args:
        forward: the module's forward.
        options: how chains are rewritten.
    """

    def __init__(self, forward: SubmoduleForward, options: Options) -> None:
        super().__init__(forward.net, options, forward.warn)
        self._forward = forward

    def check(self, graph: RewrittenGraph) -> None:
        """Check that a graph is of the same function as the others, and its chains are those of the net.

        Raises:
            MfxError: the chains are not the same.
        """
        super().check(graph)
        outer, path = self._forward.captured_outer(), self._forward.path
        known = [other for other in outer.table.graphs if other.computes(path)]
        lengths = {name: length for other in known for name, length in other.chain_lengths.items()}
        for name, length in graph.chain_lengths.items():
            if known and not outer.per_module and lengths.get(name) != length:
                raise MfxError(
                    f"{path}, called by itself, has a chain {name} of {length} steps; in the whole net the chains "
                    f"are {lengths}. Call the net instead, or use only= or skip= to leave out what differs."
                )


def install_submodules(outer: NetForward, net: nn.Module | None = None, path: str = "") -> None:
    """Give every module inside a net that may hold chains a forward of its own.

    Args:
        outer: the net's forward.
        net: the module to look into; the net itself by default.
        path: its path in the net.
    """
    module = outer.net if net is None else net
    for name, child in module._modules.items():
        if child is None or isinstance(child, Extra) or not child._modules:
            continue
        inner = paths.join(path, name)
        if not _may_hold_chains(child):
            install_submodules(outer, child, inner)
        elif "forward" not in child.__dict__:
            forward = SubmoduleForward(child, outer, inner)
            child.__dict__["forward"] = forward
            install_submodules(forward, child, inner)


def _may_hold_chains(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward:
        return False
    return not type(module).__module__.startswith("torch.nn.") or isinstance(
        module,
        nn.Sequential
        | nn.Transformer
        | nn.TransformerEncoder
        | nn.TransformerDecoder
        | nn.TransformerEncoderLayer
        | nn.TransformerDecoderLayer,
    )
