"""The graphs of a model, one view of each: the answer for explain, draw, profile and the command line."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import fx, nn
from typing_extensions import override

from mfx.capture.captured import CaptureError
from mfx.compat import compiled_model
from mfx.compiler.compiled_graphs import CompiledGraph, found_for, named_graphs
from mfx.engine import Stream, read_all
from mfx.modules.tree_copy import net_of
from mfx.net.forward import NetForward, forward_of
from mfx.options.options import OF_GRAPHS, Options
from mfx.program.chain_call import Momentum, holds_chain
from mfx.program.codegen import GraphCompiler
from mfx.program.rewritten import RewrittenGraph
from mfx.program.shapes import stream_shapes
from mfx_passes import Findings, find_chains, paths

Calls = Mapping[str, Momentum]
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class View(ABC):
    """A graph that a model runs, with its momentum calls.

    Attributes:
        module: the module whose forward the graph is.
        calls: the momentum calls, by name.
        title: names the graph, where a model has several; else empty.
        path: path in the net of the module, if its graph is that of a submodule: steps have names as in the net, nodes
            as in the module.
        streams: those of the chains in the call in question, by chain name.
        is_whole: True if the graph is all that a call of the model runs.
        flat: paths of modules whose own ``forward`` does not run, because their operations belong to several steps.
        recomputes_more: True if more than the steps of the chains runs again in the backward pass.
        blocks: paths of the blocks in no chain that run again in the backward pass, each on its own.
        leaves: paths of modules that are called as a whole because a trace cannot follow them, and why.
        conditions: the lines with conditions on values that the graph checks as it runs.
    """

    module: nn.Module
    calls: Calls
    title: str = ""
    path: str = ""
    streams: Mapping[str, tuple[Stream, ...]] = field(default_factory=dict)
    is_whole: bool = True
    flat: tuple[str, ...] = ()
    recomputes_more: bool = False
    blocks: tuple[str, ...] = ()
    leaves: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()

    @property
    def all_calls(self) -> Calls:
        """The momentum calls, and those of momentum nets inside the module."""
        return _calls_in(self.module)

    @abstractmethod
    def findings(self) -> Findings:
        """Return the chains and rejections of the graph before it was rewritten, found anew."""

    @abstractmethod
    def graph_module(self) -> fx.GraphModule:
        """Return the rewritten graph as a module."""

    def captured(self) -> fx.Graph | None:
        """Return the graph before it was rewritten; None if it is not known."""
        return None

    @abstractmethod
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        """Return all rewritten graphs that the model has so far, by training mode."""

    def run(self, module: nn.Module, calls: Calls, inputs: Inputs, compiler: GraphCompiler) -> Any:
        """Run a copy of the module, with other momentum calls in the place of ``all_calls``.

        Args:
            module: the copy.
            calls: these calls, by name.
            inputs: arguments of the call, and those by name.
            compiler: makes functions of what lies between the calls.
        """
        _replace(module, calls)
        args, kwargs = inputs
        return module(*args, **kwargs)


@dataclass(frozen=True, eq=False, kw_only=True)
class GraphView(View):
    """A rewritten graph of a net, of a module inside it, or of a compiled model.

    Attributes:
        graph: the rewritten graph.
        options: how it was rewritten.
        all_graphs: returns all rewritten graphs of the model.
    """

    graph: RewrittenGraph
    options: Options
    all_graphs: Callable[[], Mapping[str, fx.GraphModule]]

    @property
    @override
    def all_calls(self) -> Calls:
        return {**{f"{path}()": call for path, call in _calls_in(self.module).items()}, **self.calls}

    @override
    def findings(self) -> Findings:
        return self.graph.findings(self.module, self.options)

    @override
    def graph_module(self) -> fx.GraphModule:
        return self.graph.graph_module(self.module)

    @override
    def captured(self) -> fx.Graph:
        graph, _ = self.graph.captured.copy()
        return graph

    @override
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        return self.all_graphs()

    @override
    def run(self, module: nn.Module, calls: Calls, inputs: Inputs, compiler: GraphCompiler) -> Any:
        _replace(module, {path: calls[f"{path}()"] for path in _calls_in(self.module)})
        graph = copy.copy(self.graph)
        graph.calls = {name: calls[name] for name in self.calls}
        args, kwargs = inputs
        return graph(module, args, kwargs, compiler)


@dataclass(frozen=True, eq=False)
class GraphModuleView(View):
    """A graph module that was rewritten: its chains are gone from the graph and lie in the calls."""

    module: fx.GraphModule

    @override
    def findings(self) -> Findings:
        return find_chains(self.module.graph, dict(self.module.named_modules()))

    @override
    def graph_module(self) -> fx.GraphModule:
        return self.module

    @override
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        return {"train" if self.module.training else "eval": self.module}


class ChainView(View):
    """A module that calls its chains itself, without a graph, as a `mfx.MomentumNet` does."""

    @override
    def findings(self) -> Findings:
        return Findings()

    @override
    def graph_module(self) -> fx.GraphModule:
        return fx.symbolic_trace(self.module)  # a momentum net refuses that, with the reason

    @override
    def graphs(self) -> Mapping[str, fx.GraphModule]:
        return {}


@runtime_checkable
class HasStreams(Protocol):
    """A module that calls its chains itself, and tells shape and dtype of their states."""

    def streams(self, *args: Any, **kwargs: Any) -> Mapping[str, tuple[Stream, ...]]:
        """Return shape and dtype of the chains' states in a call with these arguments, by chain name."""


def views_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], usage: str) -> list[View]:
    """Return a view of the graph that a call runs, or of each graph where there are several.

    Without arguments, it is the graph that ran last, else that for default arguments. A model that is not momentumized
    is captured and rewritten as `mfx.momentumize` does by default.

    Args:
        model: any module.
        args: arguments of the call.
        kwargs: arguments by name.
        usage: how the user gives arguments, for the message of an error.

    Raises:
        MfxError: the model cannot be captured.
    """
    read_all()
    compiled = compiled_model(model)
    if compiled is not None:
        return _of_compiled(compiled) if forward_of(compiled) is None else views_of(compiled, args, kwargs, usage)
    given = bool(args or kwargs)
    if isinstance(model, fx.GraphModule) and (calls := _calls_in(model)):
        return [GraphModuleView(model, calls)]
    if holds_chain(model):
        streams = model.streams(*args, **kwargs) if given and isinstance(model, HasStreams) else {}
        return [ChainView(model, _own_calls(model), streams=streams)]
    forward = forward_of(model) or NetForward(net_of(model), Options())
    if forward.runs_per_module(args, kwargs):
        return _of_modules(forward)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mfx: ")  # an explanation says what they say
        graph = _graph_for(forward, args, kwargs, usage)
        streams = stream_shapes(forward.net, forward.options, graph, args, kwargs) if given else {}
    return [_of_graph(forward, graph, forward.graphs, streams=streams), *_inside_leaves(forward, graph)]


def breaks_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the lines of a net that keep a call from being one graph, with what each costs; none for other models."""
    forward = forward_of(model)
    return forward.table.breaks if forward is not None and forward.runs_per_module(args, kwargs) else ()


def written(model: nn.Module) -> nn.Module:
    """Return a model as it was written, without ``torch.compile`` around it."""
    compiled = compiled_model(model)
    return model if compiled is None else compiled


def backend_options(model: nn.Module) -> dict[str, Any] | None:
    """Return the options of `mfx.momentumize` by which the backend "mfx" rewrote a compiled model; None for others.

    Raises:
        MfxError: the model is compiled, and no graph of it is known.
    """
    compiled = compiled_model(model)
    if compiled is None or forward_of(compiled) is not None:
        return None
    return {name: getattr(found_for(compiled)[0].options, name) for name in OF_GRAPHS}


def last_views(net: nn.Module) -> list[View]:
    """Return views of the graphs that a net ran last; nothing is captured."""
    forward = forward_of(net)
    if forward is None:
        holders = ((path, module) for path, module in net.named_modules() if holds_chain(module))
        return [ChainView(module, _own_calls(module), path=path) for path, module in holders]
    if forward.runs_per_module((), {}):
        return _of_modules(forward)
    if forward.active is None:
        return []
    return [_of_graph(forward, forward.active, forward.graphs), *_inside_leaves(forward, forward.active)]


def _of_compiled(model: nn.Module) -> list[View]:
    named = named_graphs(model)
    return [
        _of_graph(found, found.rewritten, lambda: named, title=name, is_whole=False)
        for name, found in zip(named, found_for(model), strict=True)
    ]


def _of_modules(forward: NetForward) -> list[View]:
    """Return views of what a call ran that was not one graph; a module inside of it may be none, either."""
    titles = {module: path for path, module in forward.net.named_modules()}
    views = _of_pieces(forward, forward)
    for inner in forward.submodules():
        title = titles[inner.net]
        if inner.runs_per_module((), {}):
            views += _of_pieces(inner, forward, f"{title}, ")
        elif inner.active is not None:
            title = f"{title}, rewritten by itself"
            views.append(_of_graph(inner, inner.active, forward.graphs, title=title, is_whole=False))
    return views


def _of_pieces(forward: NetForward, root: NetForward, title: str = "") -> list[View]:
    return [
        _of_graph(forward, piece.graph, root.graphs, title=f"{title}piece {number}", is_whole=False)
        for number, piece in enumerate(forward.table.pieces.ran, 1)
    ]


def _inside_leaves(forward: NetForward, graph: RewrittenGraph) -> list[View]:
    """Return views of the modules that run chains of their own inside of what a graph calls as a whole."""
    leaves = graph.captured.leaves
    return [
        view
        for view in (_of_modules(forward) if leaves else ())
        if view.calls and any(paths.is_inside(view.path, leaf) for leaf in leaves)
    ]


def _of_graph(
    where: NetForward | CompiledGraph,
    graph: RewrittenGraph,
    all_graphs: Callable[[], Mapping[str, fx.GraphModule]],
    **attributes: Any,
) -> View:
    return GraphView(
        where.net,
        graph.calls,
        path=graph.within,
        flat=graph.flat,
        recomputes_more=graph.recomputes_more,
        blocks=graph.blocks,
        leaves={paths.join(graph.within, path): why for path, why in graph.captured.leaves.items()},
        conditions=tuple(f"{decision.line} (here {decision.value})" for decision in graph.decisions),
        graph=graph,
        options=where.options,
        all_graphs=all_graphs,
        **attributes,
    )


def _graph_for(forward: NetForward, args: tuple[Any, ...], kwargs: Mapping[str, Any], usage: str) -> RewrittenGraph:
    if args or kwargs:
        return forward.table.graph_for(args, kwargs)
    if forward.active is not None and forward.active.holds():
        return forward.active
    try:
        return forward.prepare()
    except CaptureError as error:
        raise CaptureError(f"With inputs, {usage}, TorchDynamo is asked, too. Without: {error}") from error


def _calls_in(module: nn.Module) -> Calls:
    return {path: inner for path, inner in module.named_modules() if isinstance(inner, Momentum)}


def _own_calls(module: nn.Module) -> Calls:
    return {name: child for name, child in module.named_children() if isinstance(child, Momentum)}


def _replace(module: nn.Module, calls: Calls) -> None:
    for path, call in calls.items():
        module.set_submodule(path, call)
