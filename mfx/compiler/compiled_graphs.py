"""The graphs that the torch.compile backend "mfx" has made, found by a model's tensors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import chain

from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mfx.options.options import Options
from mfx.program.by_mode import named_by_mode
from mfx.program.rewritten import RewrittenGraph
from mfx_passes import MfxError


@dataclass(eq=False)
class CompiledGraph:
    """A graph of TorchDynamo's that was rewritten and compiled, with the parameters and buffers of one model.

    Args:
        rewritten: the graph.
        net: the modules that hold the parameters and buffers.
        options: those it was rewritten by.
        mode: ``"train"`` or ``"eval"``, as the compiled module was; ``"graph"`` if a function was compiled.
    """

    rewritten: RewrittenGraph
    net: nn.Module
    options: Options
    mode: str


# By each parameter and buffer; a graph lives as long as TorchDynamo keeps it.
_GRAPHS = WeakTensorKeyDictionary()


def remember(graph: CompiledGraph) -> None:
    """Let `graphs_of` find a graph by the tensors it runs on."""
    for tensor in _tensors(graph.net):
        _GRAPHS.setdefault(tensor, []).append(weakref.ref(graph))


def graphs_of(model: nn.Module) -> list[CompiledGraph]:
    """Return the graphs that ran on parameters or buffers of a model, in the order they were made for these."""
    references = chain.from_iterable(_GRAPHS.get(tensor, ()) for tensor in _tensors(model))
    return [graph for reference in dict.fromkeys(references) if (graph := reference()) is not None]


def named_graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Return the graphs of `found_for` as modules, named by their mode: ``train``, ``train#2`` and so on.

    Raises:
        MfxError: there is none.
    """
    graphs = ((graph.mode, graph.rewritten, graph.net) for graph in found_for(model))
    return named_by_mode(graphs, type(model).__name__)


def found_for(model: nn.Module) -> list[CompiledGraph]:
    """Return the graphs of `graphs_of`, of which there must be one.

    Raises:
        MfxError: there is none.
    """
    found = graphs_of(model)
    if not found:
        raise MfxError(
            f"no graph of this compiled {type(model).__name__} is known: it was not called yet, or not compiled by "
            'backend="mfx". Call it once; or explain the model itself.'
        )
    return found


def _tensors(module: nn.Module) -> list[object]:
    return [*module.parameters(), *module.buffers()]
