"""Rewritten graphs as modules, by the mode that they serve."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from mfx.program.rewritten import RewrittenGraph


def named_by_mode(
    graphs: Iterable[tuple[str, RewrittenGraph, nn.Module]], class_name: str = ""
) -> dict[str, fx.GraphModule]:
    """Return graphs as modules, named after their mode; ``train#2`` for the second one of a mode.

    Args:
        graphs: the mode of each, the graph, and the modules that it runs on.
        class_name: the name of the modules' class; by default that of the modules they run on.
    """
    modules: dict[str, fx.GraphModule] = {}
    for mode, rewritten, net in graphs:
        count = sum(name.partition("#")[0] == mode for name in modules)
        modules[f"{mode}#{count + 1}" if count else mode] = rewritten.graph_module(net, class_name)
    return modules
