"""Parts of a net that are called by themselves: by its other methods, by its user, or because it is no one graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from mfx.modules.overlay import Extra
from mfx.net.forward import RewrittenForward
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.rewritten import RewrittenGraph
from mfx_passes import MfxError, paths


class Role(Enum):
    """What a part is to the graphs of the whole."""

    OWN = "holds whole chains"
    PIECE = "holds pieces of chains"
    UNKNOWN = "may hold a piece of a chain"
    NONE = "has nothing to do with chains, or lies in a branch"


class SubmoduleForward(RewrittenForward):
    """The forward of a module inside a net, for calls that do not come from a rewritten graph.

    A part that holds whole chains runs them as the net does. One that holds a piece of a chain cannot, and says so.

    Args:
        net: the module.
        whole: the forward of the net, or of the part, that the module belongs to.
        path: the module's path in the net.
    """

    is_part = True

    def __init__(self, net: nn.Module, whole: RewrittenForward, path: str) -> None:
        super().__init__(net, replace(whole.options, within=path, example_inputs=None))
        self.whole = whole
        self.path = path

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler = to_function) -> Any:
        """Run the module on these arguments."""
        whole = self._known_whole()
        if self.bypassed or whole.bypassed or (role := self._role_in(whole)) is Role.NONE:
            return self._original()(*args, **kwargs)
        if role is Role.UNKNOWN:
            self._refuse_chains(whole, args, kwargs)
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

    def _has_no_chain(self, entry: RewrittenGraph) -> None:
        self.per_module = True  # there is nothing to capture, whatever it is called with

    def _known_whole(self) -> RewrittenForward:
        """The smallest one around this part of which it is known what graphs it has, else the net's own."""
        whole = self.whole
        while isinstance(whole, SubmoduleForward) and not whole.per_module and not whole.all_entries:
            whole = whole.whole
        return whole

    def _role_in(self, whole: RewrittenForward) -> Role:
        if whole.per_module:
            return Role.OWN
        entries = [entry for entry in whole.all_entries if entry.computes(self.path)]
        if not entries:
            return self._role_before_capture(whole)
        chains = [sums for entry in entries for sums in entry.sums.values()]
        held = [[paths.is_inside(place, self.path) for place in sums] for sums in chains]
        if any(any(sums) and not all(sums) for sums in held):
            return Role.PIECE if any(entry.changes_function for entry in entries) else Role.NONE
        return Role.OWN if any(map(all, held)) else Role.NONE

    def _role_before_capture(self, whole: RewrittenForward) -> Role:
        is_captured = bool(whole.all_entries)  # but no graph of it has to do with this part
        if is_captured or not self.path.rpartition(".")[2].isdigit() or self.options.gamma == 0:
            return Role.OWN
        return Role.UNKNOWN

    def _refuse_chains(self, whole: RewrittenForward, args: Any, kwargs: Any) -> None:
        if self.entry_for(*args, **kwargs).calls:
            raise MfxError(
                f"{self.path} was called by itself before {type(whole.net).__name__} was captured, so it is not known "
                "which chain it belongs to. Call the net first, or give momentumize example_inputs."
            )

    def _activate(self, entry: RewrittenGraph) -> None:
        self.active = entry  # what a net shows of its graphs is the whole's business

    def check_same_function(self, entry: RewrittenGraph) -> None:
        """The chains must be the same ones, too, as those of the whole."""
        super().check_same_function(entry)
        whole = self._known_whole()
        known = [other for other in whole.all_entries if other.computes(self.path)]
        lengths = {name: length for other in known for name, length in other.chain_lengths.items()}
        for name, length in entry.chain_lengths.items():
            if known and not whole.per_module and lengths.get(name) != length:
                raise MfxError(
                    f"{self.path}, called by itself, has a chain {name} of {length} steps; in the whole net the chains "
                    f"are {lengths}. Call the net instead, or use only= or skip= to leave out what differs."
                )


def install_parts(whole: RewrittenForward, net: nn.Module | None = None, path: str = "") -> None:
    """Give every module inside a net that may hold chains a forward that knows of them.

    Args:
        whole: the net's forward.
        net: the module to look into; the net itself by default.
        path: its path in the net.
    """
    module = whole.net if net is None else net
    for name, child in module._modules.items():
        if child is None or isinstance(child, Extra) or not child._modules:
            continue
        inner = paths.join(path, name)
        if not _may_hold_chains(child):
            install_parts(whole, child, inner)
        elif "forward" not in child.__dict__:
            part = SubmoduleForward(child, whole, inner)
            child.__dict__["forward"] = part
            install_parts(part, child, inner)


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
