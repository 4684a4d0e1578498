"""The forward of a momentumized net: finds, or captures, the rewritten graph that serves a call, and runs it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from operator import attrgetter
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from mfx.capture.captured import CaptureError, signature_of
from mfx.compiler.call_site import CallSite, register
from mfx.modules.initialized import is_initialized
from mfx.modules.overlay import Mark, Overlay, remove_overlay, submodule_overlays
from mfx.modules.state_lock import StateLock
from mfx.net.copies import called, is_shared, own_overlay
from mfx.net.decided_call import NoGraphError, run_decided
from mfx.net.graph_table import GraphTable
from mfx.net.loaded import Loaded
from mfx.net.lost_effects import lost_compilation, lost_hooks, of_lost_compilation, of_lost_hooks
from mfx.net.never import never_has_chains
from mfx.net.pieces import NoPiecesError
from mfx.net.sharded import is_sharded_somewhere, refuse_containers
from mfx.net.shown import Shown
from mfx.net.under_way import Way, under_way
from mfx.net.warn_once import WarnOnce
from mfx.options.options import Options
from mfx.program.by_mode import named_by_mode
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.memory_plans import NetPlans, call_key
from mfx.program.rewritten import RewrittenGraph
from mfx.program.watched_step import WatchedStep
from mfx.text import count, listed, without_chains
from mfx_passes import MfxError

_requires_grad = attrgetter("requires_grad")


class NetForward(Overlay):
    """Stands in a net's ``__dict__`` as ``forward``, in front of its class's.

    Args:
        net: the tree copy that it is the forward of.
        options: how chains are rewritten.

    Attributes:
        table: the rewritten graphs.
        plans: what is kept for the backward pass.
        bypassed: while not 0, the net computes what its class says.
        initialized: False before a first call, at γ = 0, that draws parameters between other random numbers.
        root: the forward of the whole net.
        key: what compiled code calls it by.
        lock: held while modules of the net have other state than the user's.
        call_sites: the ways in which compiled code calls it.
        warn: warns, once per message.
    """

    def __init__(self, net: nn.Module, options: Options, lock: StateLock | None = None) -> None:
        self.net = net
        self.lock = StateLock() if lock is None else lock
        self.mark = Mark()
        self.root: NetForward = self
        self.warn = WarnOnce()
        self.table = self._make_table(options)
        self.plans = NetPlans(options.budget)
        self.bypassed = 0
        self.initialized = options.may_change_function or is_initialized(net)
        self.key = register(self)
        self.call_sites: list[CallSite] = []
        self._said = False
        self._shown = Shown(net, {"print_readable": self.print_readable, "extra_repr": self.extra_repr})

    def _make_table(self, options: Options) -> GraphTable:
        return GraphTable(self.net, options, self.warn, self.lock)

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(self.net)

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __code__(self) -> CodeType:
        return type(self.net).forward.__code__  # torch.export names inputs after its variables

    @property
    def is_opaque(self) -> bool:
        """True if compiled code may call the net as one operation."""
        plain = not (self.is_submodule or self.per_module or self.table.decides)
        return plain and not is_sharded_somewhere(self.net)

    @property
    def per_module(self) -> bool:
        """True if a call was not one graph, and the submodules ran graphs of their own."""
        return self.table.per_module

    def runs_per_module(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """True if a call was found not to be one graph; without arguments, if the graph that ran last does not hold."""
        if args or kwargs:
            return self.table.failed(args, kwargs) is not None
        return self.per_module and not (self.active and self.active.holds())

    @property
    def options(self) -> Options:
        """The options of the net."""
        return self.table.options

    @property
    def active(self) -> RewrittenGraph | None:
        """The graph that ran last."""
        return self._shown.active

    @property
    def shown(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the attributes that the net has of its graph."""
        return self._shown.names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the net on these arguments, by the rewritten graph that serves them."""
        if torch.compiler.is_dynamo_compiling():
            from mfx.compiler.call import call  # imports TorchDynamo, which takes a second

            return call(self, args, kwargs)
        if is_shared(self):
            return called(self, sys._getframe(1)).run(args, kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler = to_function) -> Any:
        """Do the same while Dynamo compiles, too, by functions that ``compiler`` makes of graphs."""
        if args and args[0] is self.net:
            args = args[1:]  # accelerate, for instance, makes a method of this, as of a function
        if self.bypassed or not (self.initialized or self._is_initialized()):
            return self.run_class_forward(args, kwargs, Way.AS_WRITTEN)
        find = partial(self.table.graph_for, args, kwargs)
        run = partial(self._run_graph, args, kwargs, compiler)
        try:
            return run_decided(self.net, args, kwargs, find, run, self.warn)
        except NoGraphError as none:
            error = none.__cause__
        assert isinstance(error, CaptureError)
        is_asked_for = self.options.capture != "auto" or self.options.layers
        if is_asked_for and self.options.may_change_function:
            raise error  # at γ = 0 whatever runs is the model
        with self._forward_pass(args, kwargs, None, plans=self.options.plans):
            return self._run_per_module(error, args, kwargs)

    def _is_initialized(self) -> bool:
        self.initialized = is_initialized(self.net)
        return self.initialized

    def _run_graph(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler, graph: RewrittenGraph
    ) -> Any:
        if not torch.compiler.is_exporting():  # that graph is not kept
            self._show(graph)
        self._mention_losses(graph)
        plans = self.options.plans or (graph.nests and self.options.budget.share != 1.0)
        with self._forward_pass(args, kwargs, graph, plans=plans):
            if graph.calls or graph.decisions:
                return graph(self.net, args, kwargs, compiler)
            self._has_no_chain()
            return self.run_class_forward(args, kwargs, Way.AS_WRITTEN)

    def _forward_pass(
        self, args: Any, kwargs: Any, graph: RewrittenGraph | None, *, plans: bool
    ) -> AbstractContextManager[None]:
        """Return a context for one forward pass, in which the chains share a plan, if they do."""
        if not plans:
            return nullcontext()
        key = call_key((args, kwargs), training=self.net.training)
        path = () if graph is None else tuple(decision.value for decision in graph.decisions)
        # A bound holds for what was measured: frozen parameters, or a graph with other modules, are another step.
        bound = () if self.plans.budget.share is not None else (id(graph), *map(_requires_grad, self.net.parameters()))
        return self.plans.forward_pass(key and (key, path, bound), partial(WatchedStep, modules=[self.net]))

    def run_class_forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], way: Way) -> Any:
        """Run the forward of the net's class, and its submodules in this way."""
        with under_way(self.root, way):
            return type(self.net).forward.__get__(self.net)(*args, **kwargs)

    def _has_no_chain(self) -> None:
        """Warn at the first such call, and give the modules that have none either the forward of their class for good.

        Called at each such call.
        """
        if self._said:
            return
        self._said = True
        if self.table.has_chains:
            return
        if not self.is_submodule:
            self.warn(without_chains(self.net, "runs as it was written"))
        own = [(self.net, self)] if self.is_submodule else []
        for module, forward in own + [(module, forward) for _, module, forward in submodule_overlays(self.net)]:
            if never_has_chains(module, replace(forward.options, min_steps=1)):  # nor a piece of one
                remove_overlay(module)

    def _run_per_module(self, error: CaptureError, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the forward as it is written between its graph breaks, and what it calls there by graphs of its own."""
        reason = str(error)
        is_known = self.table.failed(args, kwargs) is not None
        try:
            with under_way(self.root, Way.PER_MODULE):
                result = self.table.pieces.run(args, kwargs, self.options)
        except NoPiecesError:
            if not is_known:
                self._check_per_module(reason)
            result = self.run_class_forward(args, kwargs, Way.PER_MODULE)
        if is_known:
            return result
        self._check_per_module(reason)
        self.table.remember_failure(args, kwargs, reason)  # not before: it may have been the call that was wrong
        if not self.is_submodule:
            self._tell_pieces(reason)
        return result

    def _check_per_module(self, reason: str) -> None:
        try:
            self.table.check_per_module()
        except MfxError as contradiction:
            raise MfxError(f"{reason} So this call is not one graph. {contradiction}") from contradiction

    def _tell_pieces(self, reason: str) -> None:
        graphs = [graph for forward in (self, *self.submodules()) for graph in forward.table.graphs]
        chains = sorted({chain for graph in graphs for chain in graph.chain_lengths})
        found = f"these chains were found: {listed(chains)}" if chains else "no chain was found"
        breaks = self.table.pieces.breaks
        ends = f" or at one of the lines that end a graph ({listed(list(breaks))})" if breaks else ""
        self.warn(
            f"{reason} So the modules inside of it are rewritten each on its own, and a chain ends where its module "
            f"does{ends}; {found}."
        )

    def refuse_copies(self) -> None:
        """Check that it is known which module was called, where compiled code does not say.

        Raises:
            MfxError: there is a copy of the net that had never been called.
        """
        if is_shared(self):
            called(self, sys._getframe())

    def submodules(self) -> list[NetForward]:
        """Return the forwards of all submodules of the net that have one of their own."""
        return [forward for _, _, forward in submodule_overlays(self.net)]

    def load(self, loaded: Loaded | None) -> None:
        """Compare the chains that weights about to be loaded were saved with, as graphs to come will be compared.

        Args:
            loaded: these chains, None if they are not known.

        Raises:
            MfxError: a graph of the net or of its submodules has others, and nothing was changed.
        """
        tables = [part.table for part in (self, *self.submodules())]
        if loaded is not None:
            for table in tables:
                for graph in table.graphs:
                    loaded.check(table.net, graph, table.options)
        for table in tables:
            table.loaded = loaded

    def prepare(self) -> RewrittenGraph:
        """Capture and rewrite before any call, for the net's training mode and example inputs or default arguments.

        Raises:
            CaptureError: the model cannot be captured before a call.
            MfxError: an option names a chain that the model does not have.
        """
        if self.options.example_inputs is not None:
            graph, *_ = [self.table.graph_for(*call) for call in self.options.example_calls]
        elif self.options.capture != "dynamo":
            graph = self.table.graph_for_defaults()
        else:
            raise CaptureError(f"{type(self.net).__name__} is to be captured by TorchDynamo, which looks at a call.")
        self.options.check_chains(graph.chain_lengths)
        self._show(graph)
        self._mention_losses(graph)
        return graph

    def _show(self, graph: RewrittenGraph) -> None:
        self._shown.show(graph)

    def print_readable(self, *args: Any, **kwargs: Any) -> str:
        """Return the active rewritten graph as Python code; see `torch.fx.GraphModule.print_readable`."""
        graph = self.active or self.prepare()
        return graph.graph_module(self.net).print_readable(*args, **kwargs)

    def extra_repr(self) -> str:
        """Return a line for ``print(net)``: that it is momentumized, and how; after that of the class."""
        lengths = {} if self.active is None else self.active.chain_lengths
        found = f", {count(sum(lengths.values()), 'step')} in {count(len(lengths), 'chain')}" if lengths else ""
        own = type(self.net).extra_repr(self.net)
        return "\n".join(filter(None, (own, f"momentumized by mfx: gamma={self.options.given_gamma!r}{found}")))

    def graphs(self) -> dict[str, fx.GraphModule]:
        """Return the rewritten graphs, named after the training mode they are for; ``train#2`` for other arguments.

        Where a call was not one graph, those of the modules follow, with the path of the module in front.
        """
        graphs = named_by_mode((graph.mode, graph, self.net) for graph in self.table.graphs)
        for path, _, inner in submodule_overlays(self.net) if self.per_module else ():
            graphs.update((f"{path}: {name}", graph) for name, graph in inner.graphs().items())
        return graphs

    def _mention_losses(self, graph: RewrittenGraph) -> None:
        hooked = lost_hooks(graph)
        if hooked:
            refuse_containers(self.net, hooked, graph.chain_targets)
        if new := self.warn.new(hooked):
            self.warn(of_lost_hooks(new))
        if compiled := lost_compilation(graph):
            self.warn(of_lost_compilation(compiled))

    def __getstate__(self) -> dict[str, Any]:
        # What Dynamo saw is not copied; and a copy made inside of mfx.original is not part of that context.
        return {**self.__dict__, "bypassed": 0, "call_sites": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, key=register(self))


def forward_of(net: nn.Module) -> NetForward | None:
    """Return the rewritten forward of a module, also if it was wrapped; None if the module was not momentumized."""
    for forward in _unwrapped(net.__dict__.get("forward")):
        if isinstance(forward, NetForward):
            return own_overlay(net, forward)
    return None


def _unwrapped(forward: Any) -> Iterator[Any]:
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None) or getattr(forward, "__func__", None)
