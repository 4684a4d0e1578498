"""Submodules of a net called by themselves: by its other methods, by its user, or as the net is not one graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from mfx.capture.symbolic.leaf_modules import LOOKED_INTO
from mfx.modules.overlay import Extra
from mfx.net.agreement import check_agreement
from mfx.net.forward import NetForward
from mfx.net.graph_table import GraphTable
from mfx.net.under_way import UNDER_WAY, Way
from mfx.options.options import Options
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.rewritten import RewrittenGraph
from mfx.text import listed
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
        options = replace(outer.options, within=path, example_inputs=None)
        if not isinstance(options.velocity, str):
            options = replace(options, velocity="zero")  # see SubmoduleTable.check
        super().__init__(net, options, outer.lock)
        self.outer = outer
        self.path = path
        self.root = outer.root
        self._role: tuple[list[RewrittenGraph], Role] | None = None

    def _make_table(self, options: Options) -> GraphTable:
        return SubmoduleTable(self, options)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler = to_function) -> Any:
        """Run the module on these arguments."""
        way = UNDER_WAY.way if UNDER_WAY.root is self.root else None
        if way is Way.AS_WRITTEN:
            return type(self.net).forward.__get__(self.net)(*args, **kwargs)
        outer = self.captured_outer()
        if self.bypassed or outer.bypassed:
            return self.run_class_forward(args, kwargs, Way.AS_WRITTEN)
        role = self._role_in(outer)
        if role is Role.PIECE and any(graph.changes_function for graph in outer.table.graphs):
            return self._run_piece(outer, args, kwargs, way)
        if way is Way.PER_MODULE or role is Role.OWN:
            return super().run(args, kwargs, compiler)
        if role is Role.UNKNOWN:
            self._refuse_chains(outer, args, kwargs)
        return self.run_class_forward(args, kwargs, Way.AS_WRITTEN)

    def _run_piece(self, outer: NetForward, args: tuple[Any, ...], kwargs: Mapping[str, Any], way: Way | None) -> Any:
        if way is Way.PER_MODULE:
            chains = sorted({name for graph in outer.table.graphs for name in graph.chain_lengths})
            raise MfxError(
                f"{type(self.root.net).__name__} has other chains in one call than in another: this call is not one "
                f"graph, so its modules run each on its own, and {self.path} holds but a piece of a chain "
                f"({listed(chains)}). Momentumize the part of the model that both calls have in common, or leave the "
                "chain out by skip=."
            )
        self.warn(
            f"{self.path} was called by itself, outside of the net's forward, and computes what it did before it "
            "was rewritten: it holds but a piece of a chain. Call the net, or a part that holds whole chains."
        )
        return type(self.net).forward.__get__(self.net)(*args, **kwargs)

    def captured_outer(self) -> NetForward:
        """Return the forward of the smallest captured module around this one, else the net's."""
        outer = self.outer
        while isinstance(outer, SubmoduleForward) and not outer.per_module and not outer.table.graphs:
            outer = outer.outer
        return outer

    def _role_in(self, outer: NetForward) -> Role:
        graphs = outer.table.graphs
        if self._role is None or self._role[0] != graphs:
            self._role = graphs, self._find_role(outer)
        return self._role[1]

    def _find_role(self, outer: NetForward) -> Role:
        graphs = [graph for graph in outer.table.graphs if graph.computes(self.path)]
        if not graphs:
            return self._role_before_capture(outer)
        held = [[paths.is_inside(path, self.path) for path in sums] for graph in graphs for sums in graph.sums.values()]
        if any(any(sums) and not all(sums) for sums in held):
            return Role.PIECE
        return Role.OWN if any(map(all, held)) else Role.NONE

    def _role_before_capture(self, outer: NetForward) -> Role:
        is_captured = outer.per_module or outer.table.graphs  # but none of the graphs computes this module
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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_role": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SubmoduleForward:
        outer: NetForward = self
        while isinstance(outer, SubmoduleForward):
            outer = outer.outer
            if id(outer.net) not in memo:
                memo[id(outer)] = outer  # a module that is copied by itself stays one of this net
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


class SubmoduleTable(GraphTable):
    """The rewritten graphs of a module inside a net, whose chains are chains of the net.

    Args:
        forward: the module's forward.
        options: how chains are rewritten.
    """

    def __init__(self, forward: SubmoduleForward, options: Options) -> None:
        super().__init__(forward.net, options, forward.warn, forward.lock)
        self._forward = forward

    def check(self, graph: RewrittenGraph) -> None:
        """Check that a graph is of the same function as the others, and its chains are those of the net.

        Raises:
            MfxError: the chains are not the same.
        """
        super().check(graph)
        check_agreement(self._forward.root.net, graph, self._forward.captured_outer().table.graphs)
        if graph.changes_function and not isinstance(self._forward.root.options.velocity, str):
            raise MfxError(
                f"{self._forward.path} was called by itself, and the modules that compute v0 are known to the whole "
                "net only. Call the net, or use velocity='zero' or 'residual'."
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
            forward.install()
            install_submodules(forward, child, inner)


def _may_hold_chains(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward:
        return False
    return not type(module).__module__.startswith("torch.nn.") or isinstance(module, LOOKED_INTO)
