"""What a model's modules do beside computing, and a rewritten net does not: run hooks, and set attributes."""

from __future__ import annotations

from mfx.compat import hook_tables
from mfx.program.rewritten import RewrittenGraph
from mfx.text import listed
from mfx_passes import paths


def lost_hooks(entry: RewrittenGraph) -> list[str]:
    """Paths of the modules with hooks that are not called as a whole."""
    walked = entry.captured.walked
    return [path for path in entry.flat if path and path in walked and any(hook_tables(walked[path]))]


def lost_marks(entry: RewrittenGraph) -> list[str]:
    """The attributes that the forwards of modules set which are not called as a whole, by their paths."""
    walked = entry.captured.walked
    flat = {walked[path]: path for path in ("", *entry.flat) if path in walked}
    return [
        paths.join(flat[module], name)
        for module, names in entry.assigned.items()
        if module in flat
        for name in sorted(names)
    ]


def of_lost_hooks(modules: list[str]) -> str:
    """What to say of `lost_hooks`."""
    return (
        f"hooks on {listed(modules)} will not run: sums in there are part of a momentum chain, so these modules "
        "are not called as a whole. Put the hooks on modules inside a branch."
    )


def of_lost_marks(name: str, marks: list[str]) -> str:
    """What to say of `lost_marks` of a model of this name."""
    return (
        f"{name}.forward sets {listed(marks)}, which the rewritten net does not do: these "
        "modules are not called as a whole. Return such values instead."
    )
