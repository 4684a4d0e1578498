"""Side effects of a model's modules that a rewritten net does not have: hooks that run, Python state that changes."""

from __future__ import annotations

from torch import nn

from mfx.capture.captured import CaptureError, PathsError
from mfx.compat import hook_tables, is_compiled, is_sharding_hook
from mfx.program.rewritten import RewrittenGraph
from mfx.text import listed
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations


def lost_hooks(graph: RewrittenGraph) -> list[str]:
    """Return the paths of modules with hooks that are not called as a whole."""
    walked, containers = graph.captured.walked, graph.containers
    return [path for path in graph.flat if path in walked and _loses_hooks(walked[path], is_run=path in containers)]


def _loses_hooks(module: nn.Module, *, is_run: bool) -> bool:
    """True if a module has hooks; those by which FSDP2 shards a run of steps are not lost."""
    hooks = [hook for table in hook_tables(module) for hook in table.values()]
    return not all(is_run and is_sharding_hook(hook) for hook in hooks)


def of_lost_hooks(modules: list[str]) -> str:
    """Return the warning for `lost_hooks`."""
    return (
        f"hooks on {listed(modules)} will not run: sums in there are part of a momentum chain, so these modules "
        "are not called as a whole. Put the hooks on modules inside a branch."
    )


def lost_compilation(graph: RewrittenGraph) -> list[str]:
    """Return the paths of modules that were compiled each by itself, and that are not called as a whole."""
    walked = graph.captured.walked
    return [path for path in graph.flat if path in walked and is_compiled(walked[path])]


def of_lost_compilation(modules: list[str]) -> str:
    """Return the warning for `lost_compilation`."""
    return (
        f"what torch.compile made of {listed(modules)} will not run: steps of a momentum chain lie in there, so these "
        "modules are not called as a whole. Compile modules inside a branch, or the net."
    )


def refuse_lost_effects(net: nn.Module, graph: RewrittenGraph) -> None:
    """Refuse a graph that leaves out what the model's forward changes in Python beside its result.

    A module that the graph calls as a whole makes its changes itself; but if that is in a branch, which runs twice,
    only changes of its own state can be undone.

    Raises:
        CaptureError: it does.
    """
    flat = {"", *graph.flat}
    lost = [effect for effect in graph.captured.effects if effect.path in flat or not effect.is_own]
    if lost and graph.calls:
        names = list(dict.fromkeys(effect.name for effect in lost))
        raise CaptureError(
            f"{type(net).__name__}.forward changes {listed(names)} beside its result, which a symbolic trace does not "
            "record. Return such values instead."
        )


def refuse_lasting_writes(net: nn.Module, graph: RewrittenGraph) -> None:
    """Refuse a graph with conditions that writes into what a call cannot put back: its arguments, and parameters.

    Where a condition is not as it was in the trace, what was computed by then is undone.

    Raises:
        PathsError: it does.
    """
    if not graph.decisions:
        return
    captured, buffers = graph.captured, dict(net.named_buffers(remove_duplicate=False))
    index = GraphIndex(captured.graph, captured.modules_of(net))
    for mutation in Mutations(index).at(index.nodes):
        for node in mutation.family:
            if node.op == "placeholder" or (node.op == "get_attr" and str(node.target) not in buffers):
                raise PathsError(
                    f"{type(net).__name__} changes {node.target} in place, and decides on the value of a tensor "
                    f"({graph.decisions[0].line}): if a call decides otherwise, the change cannot be undone."
                )
