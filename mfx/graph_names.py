"""Rewritten graphs as modules, by the names that users know them by."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from mfx.entry import Entry

__all__ = ["named_by_mode"]


def named_by_mode(graphs: Iterable[tuple[str, Entry, nn.Module]]) -> dict[str, fx.GraphModule]:
    """Graphs as modules, named after the mode they are for; ``train#2`` for the second one of a mode.

    Args:
        graphs: the mode of each, the graph, and the modules that it runs on.
    """
    modules: dict[str, fx.GraphModule] = {}
    for mode, entry, net in graphs:
        count = sum(name.partition("#")[0] == mode for name in modules)
        modules[f"{mode}#{count + 1}" if count else mode] = entry.graph_module(net)
    return modules
