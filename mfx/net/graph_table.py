"""The rewritten graphs of a net: found for a call, or captured, and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mfx import compat
from mfx.capture.arguments import refuse_nested
from mfx.capture.captured import CaptureError, PathsError, RaisedError
from mfx.capture.decisions import Decision
from mfx.capture.guards import HOLDS, Guard
from mfx.capture.module_guards import ModuleGuard
from mfx.modules.aside import aside
from mfx.modules.overlay import drop_overlays, submodule_overlays
from mfx.modules.state_lock import StateLock
from mfx.net.agreement import check_agreement, check_per_module
from mfx.net.call_kinds import exact_kind_of, kind_of
from mfx.net.loaded import Loaded
from mfx.net.pieces import Pieces
from mfx.net.routes import DynamoRoute, SymbolicRoute
from mfx.options.options import Options
from mfx.program.record import Record
from mfx.program.rewritten import RewrittenGraph
from mfx.progress import waiting_for
from mfx_passes import MfxError

_CHECKPOINTING = (
    "gradient checkpointing is switched on in this {}, and mfx leaves it out of its chains: their steps run again in "
    "the backward pass anyway, once. Leave it switched off: gradient_checkpointing_disable()."
)
_KINDS = 8  # of calls without a graph, or without chains, that are told apart


class GraphTable:
    """The rewritten graphs of a net: one per training mode and set of arguments that are not tensors.

    Args:
        net: the net.
        options: how chains are rewritten.
        warn: warns, once per message.
        lock: the net's.

    Attributes:
        loaded: the chains that the net's weights were saved with, if they were loaded with a record of them.
        pieces: the pieces of calls that are not one graph.
        decides: True if a graph has had conditions on values; a flag, for Dynamo to guard on no more than that.
    """

    def __init__(self, net: nn.Module, options: Options, warn: Callable[[str], None], lock: StateLock) -> None:
        self.net = net
        self.options = options
        self.loaded: Loaded | None = None
        self.decides = False
        self._known: Record | None = None
        self._warn, self._lock = warn, lock
        self._without_chains: dict[Hashable, tuple[RewrittenGraph, list[Guard]]] = {}
        self._failures: dict[tuple[str, ...], str] = {}
        self._symbolic = SymbolicRoute(net)
        self._dynamo = DynamoRoute(net)
        self.pieces = Pieces(net)

    @property
    def graphs(self) -> list[RewrittenGraph]:
        """All rewritten graphs that are kept."""
        return [*self._symbolic.graphs, *self._dynamo.graphs, *self.pieces.graphs]

    @property
    def record(self) -> Record | None:
        """The chains of the graphs, else of those of the table that this is a copy of; None before the first graph."""
        return Record.merged(graph.record for graph in self.graphs if graph.in_place()) or self._known

    @compat.without_function_modes()  # which are told of each size that is read, and there is more to read at first
    def graph_for(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Sequence[Decision] = ()
    ) -> RewrittenGraph:
        """Return the rewritten graph that a call with these arguments runs, or would run.

        Args:
            args: arguments of the call.
            kwargs: arguments by name.
            path: the first decisions of the call, as far as they are known.

        Raises:
            CaptureError: the model cannot be captured for them.
            MfxError: the graph would be of another function than the others.
        """
        refuse_nested(self.net, args, kwargs)
        kind = exact_kind_of(self.net, args, kwargs)
        graph, guards = self._without_chains.get(kind, (None, ()))
        if graph is not None and all(map(HOLDS, guards)):
            return graph
        graph = self._symbolic.find(args, kwargs, path) or (None if path else self._dynamo.find(args, kwargs))
        if graph is None or not graph.shapes_known:
            graph = self._capture_or_fit(graph, args, kwargs, path)
        if kind is not None and not graph.calls and not graph.decisions and not torch.compiler.is_exporting():
            self._remember_without_chains(kind, graph)
        return graph

    def _capture_or_fit(
        self,
        graph: RewrittenGraph | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        path: Sequence[Decision],
    ) -> RewrittenGraph:
        has_shapes = compat.runs_for_real() or torch.compiler.is_exporting()
        if graph is None and (reason := self.failed(args, kwargs)) is not None:
            raise CaptureError(reason)
        with waiting_for(f"capturing a call of {type(self.net).__name__}"), aside(self.net):
            graph = graph or self._capture(args, kwargs, path)
            return self._fit(graph, args, kwargs) if has_shapes and not graph.shapes_known else graph

    def _remember_without_chains(self, kind: Hashable, graph: RewrittenGraph) -> None:
        """Find the graph for calls of this kind by guards on the modules alone: Dynamo's take longer than some models.

        A layer of torch's has no chain, in whatever state it is.
        """
        guards = [guard for guard in graph.guards if not (isinstance(guard, ModuleGuard) and _is_layer(guard.module))]
        self._without_chains = {**dict(list(self._without_chains.items())[-_KINDS:]), kind: (graph, guards)}

    @property
    def has_chains(self) -> bool:
        """True if a graph has a chain, or had one before shapes were known."""
        record = self.record
        return record is not None and bool(record.traced or record.chains)

    @property
    def per_module(self) -> bool:
        """True if a call was not one graph, and ran module by module."""
        return bool(self._failures)

    @property
    def breaks(self) -> tuple[str, ...]:
        """The lines that keep calls from being one graph, with what each costs, else why there was none."""
        return self.pieces.breaks or tuple(dict.fromkeys(self._failures.values()))

    def failed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Return the reason why a call of this kind was not one graph; None if there was none."""
        reason = self._failures.get(kind_of(self.net, args, kwargs))
        return next(iter(self._failures.values())) if reason is None and len(self._failures) >= _KINDS else reason

    def remember_failure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: str) -> None:
        """From now on, do not look for a graph for calls of this kind."""
        self._failures[kind_of(self.net, args, kwargs)] = reason

    def check_per_module(self, graphs: Iterable[RewrittenGraph] | None = None) -> None:
        """Check that graphs, all by default, have the chains that a call has which runs module by module.

        Raises:
            MfxError: one has others.
        """
        modules = {forward.path: forward.table.graphs for _, _, forward in submodule_overlays(self.net)}
        trained = self.net.training if graphs is None else any(kind[0] == str(True) for kind in self._failures)
        for graph in self.graphs if graphs is None else graphs:
            if not graph.captured.partial:
                check_per_module(self.net, graph, modules, self.pieces.graphs, training=trained)

    def _fit(self, graph: RewrittenGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RewrittenGraph:
        """Return a graph with the steps that fit the shapes of a call, and keep it in place of the other."""
        fitting = self._symbolic.fit(graph, args, kwargs, self.options, self._warn)
        if fitting is None:
            graph.shapes_known = True  # as far as they can be
            return graph
        fitting.shapes_known = True
        try:
            self.check(fitting)
        except CaptureError:
            self._symbolic.drop(graph)  # the next such call runs module by module at once
            raise
        except MfxError:
            fitting.shapes_known = False  # the next such call is refused, too
            raise
        fitting.use_lock(self._lock)
        self._symbolic.replace(graph, fitting)
        return fitting

    def graph_for_defaults(self) -> RewrittenGraph:
        """Return the rewritten graph for the net's training mode and default arguments, by symbolic tracing.

        Raises:
            CaptureError: the model cannot be traced without a call.
            MfxError: the graph would be of another function than the others.
        """
        with waiting_for(f"tracing {type(self.net).__name__}"), aside(self.net):
            graph = self._symbolic.for_defaults(self.options)
            return graph if graph in self.graphs else self._admit(graph, self._symbolic)

    def _capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Sequence[Decision]) -> RewrittenGraph:
        options = self.options
        if path:
            graph = self._symbolic.capture_with_leaves(args, kwargs, options, path)
            return self._admit(graph, self._symbolic)
        if options.capture == "dynamo":
            return self._admit(self._dynamo.capture(args, kwargs, options), self._dynamo)
        try:
            return self._admit(self._symbolic.capture(args, kwargs, options), self._symbolic)
        except CaptureError as untraceable:
            return self._admit(*self._second_best(args, kwargs, untraceable))

    def _second_best(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], untraceable: CaptureError
    ) -> tuple[RewrittenGraph, SymbolicRoute | DynamoRoute]:
        """Return a graph of a model that cannot be traced symbolically as it is, and the route that it came by.

        Two are tried: a trace of one path, which calls modules that it cannot follow as a whole, their sums with them;
        and TorchDynamo, which may look into these modules and may have to give up. The one with more steps is taken: a
        leaf never costs a step. If they have as many, it is Dynamo's: that one holds for more shapes, and it knows what
        the modules do; but not if only the other has the chains of other calls. A trace without any step is none: the
        modules are then rewritten each on its own.

        Raises:
            CaptureError: there is none.
        """
        leaves: RewrittenGraph | None = None
        try:
            leaves = self._symbolic.capture_with_leaves(args, kwargs, self.options)
        except PathsError as error:
            untraceable = error
        except CaptureError:
            pass  # Dynamo may do
        steps = sum(leaves.chain_lengths.values()) if leaves else 0
        refused = untraceable
        agrees = leaves is not None and steps > 0 and self._agrees(leaves)
        # A decision is a graph break to Dynamo, or the model computes otherwise, to the last bit, where that traces.
        decides = agrees and leaves is not None and leaves.decisions and not self.options.may_change_function
        if self.options.capture == "auto" and not decides:
            try:
                graph = self._dynamo.capture(args, kwargs, self.options)
            except RaisedError as error:
                refused = error
            except CaptureError as error:
                refused = CaptureError(f"{error} (Before that: {untraceable})")
                refused.__cause__ = error.__cause__
            else:
                if steps <= sum(graph.chain_lengths.values()) and not (agrees and not self._agrees(graph)):
                    return graph, self._dynamo
        if leaves is None or not steps:
            raise refused
        self._symbolic.settle_for_leaves(leaves)
        return leaves, self._symbolic

    def _admit(self, graph: RewrittenGraph, route: SymbolicRoute | DynamoRoute) -> RewrittenGraph:
        """Check a new graph, and keep it; the modules that it calls as a whole are left as they are."""
        self.check(graph)
        if graph.calls and _checkpoints(self.net):
            self._warn(_CHECKPOINTING.format(type(self.net).__name__))
        if torch.compiler.is_exporting():
            return graph  # its constants may be tensors without values: it is for this once
        if graph.shapes_known and not self.options.within:  # options name chains of the net as a whole
            self.options.check_chains(graph.chain_lengths)
        self.decides = self.decides or bool(graph.decisions)
        self.options.decide(graph.updates)
        drop_overlays(self.net, graph.called_modules, graph.captured.leaves)
        graph.use_lock(self._lock)
        route.keep(graph)
        return graph

    def _agrees(self, graph: RewrittenGraph) -> bool:
        try:
            self.check(graph)
        except MfxError:
            return False
        return True

    def check(self, graph: RewrittenGraph) -> None:
        """Check that a graph is of the same function as the others.

        Raises:
            MfxError: the chains are not the same, see `check_agreement` and `Loaded`.
            CaptureError: there were calls that are not one graph, and ran module by module with other chains.
        """
        check_agreement(self.net, graph, self.graphs)
        if self.loaded is not None:
            self.loaded.check(self.net, graph, self.options)
        if self.per_module:
            try:
                self.check_per_module([graph])
            except MfxError as error:
                raise CaptureError(f"{error} Such a call came before.") from error

    def __getstate__(self) -> dict[str, Any]:
        # Graphs that Dynamo captured are not copied.
        return {**self.__dict__, "_known": self.record, "_without_chains": {}}


def _checkpoints(net: nn.Module) -> bool:
    """True if a model of Hugging Face was told to checkpoint its layers."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in net.modules())


def _is_layer(module: nn.Module) -> bool:
    return not module._modules and type(module).__module__.startswith("torch.nn.")
