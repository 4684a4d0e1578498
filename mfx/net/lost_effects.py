"""Side effects of a model's modules that a rewritten net does not have: hooks that run, attributes that are set."""

from __future__ import annotations

from mfx.compat import hook_tables
from mfx.program.rewritten import RewrittenGraph
from mfx.text import listed
from mfx_passes import paths


def lost_hooks(graph: RewrittenGraph) -> list[str]:
    """Return the paths of modules with hooks that are not called as a whole."""
    walked = graph.captured.walked
    return [path for path in graph.flat if path and path in walked and any(hook_tables(walked[path]))]


def lost_attributes(graph: RewrittenGraph) -> list[str]:
    """Return the paths of attributes that are set by the forwards of modules that are not called as a whole."""
    walked = graph.captured.walked
    flat = {walked[path]: path for path in ("", *graph.flat) if path in walked}
    return [
        paths.join(flat[module], name)
        for module, names in graph.assigned.items()
        if module in flat
        for name in sorted(names)
    ]


def of_lost_hooks(modules: list[str]) -> str:
    """Return the warning for `lost_hooks`."""
    return (
        f"hooks on {listed(modules)} will not run: sums in there are part of a momentum chain, so these modules "
        "are not called as a whole. Put the hooks on modules inside a branch."
    )


def of_lost_attributes(name: str, attributes: list[str]) -> str:
    """Return the warning for `lost_attributes` of a model of this name."""
    return (
        f"{name}.forward sets {listed(attributes)}, which the rewritten net does not do: these "
        "modules are not called as a whole. Return such values instead."
    )
