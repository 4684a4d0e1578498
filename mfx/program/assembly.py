"""The function of a rewritten graph, assembled from its momentum calls and the segments between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Graph

from mfx.engine import ARITHMETICS, ChainSettings
from mfx.options.gamma import Gamma
from mfx.program.between_chains import BetweenChains
from mfx.program.chain_call import Momentum
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.scope import Scope
from mfx.program.segments import split_between_calls
from mfx_passes.ir import block_of


class Assembly:
    """The function of a rewritten graph.

    Args:
        graph: the rewritten graph.
        calls: its momentum calls by name.
        compiler: turns graphs into functions: those of the steps, and the segments between the chains.
        flags: the module whose training flags, and those of modules in it, say whether signs of γ are drawn; None: the
            holder of each call.
        recompute_between: True if the segments are recomputed in the backward pass, as the steps are. If not, blocks
            are, see `mfx_passes.find.blocks`, unless all steps keep their activations.
        verify: see `BetweenChains`.
    """

    def __init__(
        self,
        graph: Graph,
        calls: Mapping[str, Momentum],
        compiler: GraphCompiler,
        *,
        flags: nn.Module | None = None,
        recompute_between: bool = False,
        verify: str = "warn",
    ) -> None:
        self._segments: dict[str, Callable[..., Any]] = {}
        between = partial(BetweenChains, compiler=compiler, settings=_settings(calls, verify))
        segment = None if compiler is to_function else compiler
        if recompute_between:
            graph, self._segments = split_between_calls(graph, between)
        elif _has_blocks(graph) and not all(call.keeps_all for call in calls.values()):
            graph, self._segments = split_between_calls(graph, segment, blocks=partial(between, always=True))
        elif segment is not None:
            graph, self._segments = split_between_calls(graph, segment)
        self._function = to_function(graph)
        called = {str(node.target) for node in graph.find_nodes(op="call_module")}.intersection(calls)
        self._momenta, self._flags = tuple(calls.items()), flags
        self._compiler = None if compiler is to_function else compiler
        self._calls = {**calls, **{name: _unobserved(calls[name], compiler) for name in called}}

    def __call__(self, holder: Any, *inputs: Any) -> Any:
        """Run the graph.

        Args:
            holder: object under whose attributes the graph finds modules and tensors.
            *inputs: the inputs of the graph.
        """
        segments = {name: partial(segment, holder) for name, segment in self._segments.items()}
        flags = holder if self._flags is None else self._flags
        signed = {
            name: partial(call.forward, settings=call.settings_on(flags), compiler=self._compiler)
            for name, call in self._momenta
            if call.settings.gamma.has_signs
        }
        return self._function(Scope({**self._calls, **signed, **segments}, holder), *inputs)


def _has_blocks(graph: Graph) -> bool:
    return any(block_of(node) is not None for node in graph.nodes)


def _settings(calls: Mapping[str, Momentum], verify: str) -> ChainSettings:
    """Return the settings of what is recomputed beside the chains: a step at γ = 0, on the same modules as theirs."""
    settings = ChainSettings(Gamma(0, 1), ARITHMETICS["exact"], verify=verify)
    for call in calls.values():
        settings = replace(settings, lock=call.settings.lock, offload=settings.offload or call.settings.offload)
    return settings


def _unobserved(call: Momentum, compiler: GraphCompiler) -> Callable[..., Any]:
    """Return the forward of a momentum call: hooks on all modules are about those of the user's model."""
    return call.forward if compiler is to_function else partial(call.forward, compiler=compiler)
