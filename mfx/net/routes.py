"""The two routes from a call to a rewritten graph: symbolic tracing, and TorchDynamo."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfx import compat
from mfx.capture.arguments import bind, bind_defaults, check_constants, check_signature
from mfx.capture.binding import ByName
from mfx.capture.captured import Captured, CaptureError, PathsError, signature_of
from mfx.capture.decisions import Decision, Guesses
from mfx.capture.named_steps import named_steps_of
from mfx.capture.symbolic.leaves import Leaves
from mfx.capture.symbolic.refusals import DECISION
from mfx.capture.symbolic.trace import capture
from mfx.modules.overlay import bare_submodules
from mfx.net.call_kinds import caches_weights
from mfx.net.lost_effects import refuse_lasting_writes, refuse_lost_effects
from mfx.net.sharded import refuse_shards
from mfx.options.options import Options
from mfx.program.chain_call import holds_chain
from mfx.program.rewriting import rewrite_captured
from mfx.program.rewritten import RewrittenGraph
from mfx.program.shapes import find_with_shapes
from mfx_passes.paths import is_inside, join

_NONE: Mapping[str, str] = {}
_PATHS = 8  # by conditions on values, for calls that are alike in all else
_KEPT = 8  # graphs per set of arguments; a model whose attributes follow a schedule needs a new one for every value


class SymbolicRoute:
    """Traces the model without running it, once per training mode and set of arguments that are not tensors.

    Args:
        net: the net.

    Attributes:
        graphs: the graphs that are kept, oldest first.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self.graphs: list[RewrittenGraph] = []
        self._failures: dict[Hashable, str] = {}
        self._with_leaves: set[Hashable] = set()
        self._deciding: dict[Hashable, dict[str, str]] = {}
        self._many_paths: dict[Hashable, str] = {}

    def find(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Sequence[Decision] = ()
    ) -> RewrittenGraph | None:
        """Return the graph that serves a call, None if there is none; of several paths, the one taken last.

        Args:
            args: arguments of the call.
            kwargs: arguments by name.
            path: the first decisions of the call, as far as they are known.
        """
        last = None
        for graph in self.graphs:
            if not graph.is_on(path) or not graph.serves(self._net, args, kwargs):
                continue
            if not graph.decisions:
                return graph
            if _mode(graph) not in self._many_paths and (last is None or graph.last_use > last.last_use):
                last = graph
        return last

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options) -> RewrittenGraph:
        """Capture and rewrite a graph for a call.

        Raises:
            CaptureError: the model cannot be traced.
        """
        binding = bind(self._net, signature_of(self._net), args, kwargs)
        check_constants(self._net, binding)
        if (binding.key, self._net.training) in self._with_leaves:
            return self.capture_with_leaves(args, kwargs, options)
        return self._capture(binding, options)

    def capture_with_leaves(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options, path: Sequence[Decision] = ()
    ) -> RewrittenGraph:
        """Capture and rewrite a graph for a call that has conditions on values, and calls some modules as a whole.

        These are the modules that cannot be traced. A condition in a module without sums makes that one, too.

        Args:
            args: arguments of the call.
            kwargs: arguments by name.
            options: how chains are rewritten.
            path: the first decisions of the call, as far as they are known; the others are guessed.

        Raises:
            CaptureError: the model cannot be traced even so.
            PathsError: its calls take too many paths, or cannot be undone.
        """
        binding = bind(self._net, signature_of(self._net), args, kwargs)
        check_constants(self._net, binding)
        inputs = binding.tensors(args, kwargs)
        if any(map(compat.is_fake, inputs.values())):
            raise CaptureError(f"{type(self._net).__name__} is called on tensors of another trace.")
        mode = binding.key, self._net.training
        if path:  # the guess that led here may never come true
            self.graphs = [graph for graph in self.graphs if not graph.decisions or graph.last_use]
        known = [graph for graph in self.graphs if graph.decisions and graph.serves(self._net, args, kwargs)]
        if len(known) >= _PATHS:
            self._many_paths[mode] = known[0].decisions[0].line
        if mode in self._many_paths:
            raise PathsError(
                f"{type(self._net).__name__} takes more than {_PATHS} paths, by conditions on the values of tensors; "
                f"the first is {self._many_paths[mode]}."
            )
        deciding = self._deciding.setdefault(mode, {})
        graph = self._traced(binding, options, inputs, path, deciding)
        if not path and (more := _whole(graph, options)):
            with suppress(CaptureError):  # then their conditions stay decisions
                other = self._traced(binding, options, inputs, path, {**deciding, **more})
                if _count(other) >= _count(graph, more):
                    graph = other
                    deciding |= more
        graph.shapes_known = True  # the trace was made with shapes
        return graph

    def settle_for_leaves(self, graph: RewrittenGraph) -> None:
        """Capture later calls like that of a graph with leaves, too, whatever their shapes are."""
        self._with_leaves.add((graph.captured.binding.key, graph.training))

    def for_defaults(self, options: Options) -> RewrittenGraph:
        """Return the graph for default arguments, captured and rewritten now if there is none.

        Raises:
            CaptureError: the model cannot be traced without a call.
        """
        signature = signature_of(self._net)
        check_signature(self._net, signature)
        binding = bind_defaults(signature)
        check_constants(self._net, binding)
        kept = (graph for graph in self.graphs if graph.captured.binding.key == binding.key and graph.holds())
        return next(kept, None) or self._capture(binding, options)

    def _capture(self, binding: ByName, options: Options) -> RewrittenGraph:
        net = self._net
        self.graphs = [graph for graph in self.graphs if graph.in_place()]
        mode = binding.key, net.training
        if mode in self._failures:
            raise CaptureError(self._failures[mode])
        try:
            return self._traced(binding, options, None)
        except CaptureError as error:
            # else there is nothing to fall back on, or other conditions than in a call: try again
            if options.capture != "symbolic" and not torch.compiler.is_exporting():
                self._failures[mode] = str(error)
            raise

    def _traced(
        self,
        binding: ByName,
        options: Options,
        inputs: Mapping[str, Tensor] | None,
        path: Sequence[Decision] = (),
        deciding: Mapping[str, str] = _NONE,
    ) -> RewrittenGraph:
        net, leaves = self._net, Leaves(allowed=inputs is not None)
        modules = dict(net.named_modules()) if deciding else {}
        for name in modules.keys() & deciding:
            leaves.add(modules[name], deciding[name])
        while True:  # where a trace has failed and gone on, it may have left something behind
            leaves.grew = False
            guesses = None if inputs is None else Guesses(path, self._last_path)
            with bare_submodules(net):
                captured = capture(net, binding, named_steps_of(net, options), holds_chain, leaves, inputs, guesses)
            if not leaves.grew:
                graph = rewrite_captured(net, captured, options, {})
                refuse_lost_effects(net, graph)
                refuse_lasting_writes(net, graph)
                graph.traced = graph.chains
                return graph

    @property
    def _last_path(self) -> Sequence[Decision]:
        """The conditions of the last call that had any."""
        return max(self.graphs, key=lambda graph: graph.last_use).decisions if self.graphs else ()

    def keep(self, graph: RewrittenGraph) -> None:
        """Keep a graph for later calls; the oldest one goes if there are many for the same arguments."""
        key = graph.captured.binding.key
        alike = [other for other in self.graphs if other.captured.binding.key == key]
        if len(alike) == (_KEPT * _PATHS if graph.decisions else _KEPT):
            self.graphs.remove(alike[0])
        self.graphs.append(graph)

    def fit(
        self,
        graph: RewrittenGraph,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: Options,
        warn: Callable[[str], None],
    ) -> RewrittenGraph | None:
        """Return a graph without the steps that do not fit the shapes of a call, which may be the graph itself.

        None if the shapes cannot be found without running the model.
        """
        net = self._net
        found = find_with_shapes(net, graph.captured, options, args, kwargs)
        if found is None:
            return None
        rejections = {rejection.node.name: rejection for rejection in found.rejections}
        rejected = {name: rejections[name] for name in graph.steps if name in rejections}
        if not rejected:
            return graph
        refused = {name: (rejection.refusal, rejection.facts) for name, rejection in rejected.items()}
        fitting = rewrite_captured(net, graph.captured, options, refused)
        fitting.traced = graph.traced
        for name, rejection in rejected.items():
            path = graph.steps[name] or "the model"
            warn(f"the residual add {name} in {path} is left as it was: {rejection.reason}.")
        return fitting

    def drop(self, graph: RewrittenGraph) -> None:
        """Keep a graph no longer."""
        self.graphs = [other for other in self.graphs if other is not graph]

    def replace(self, graph: RewrittenGraph, fitting: RewrittenGraph) -> None:
        """Keep a graph in place of another one, if that one was kept."""
        self.graphs = [fitting if other is graph else other for other in self.graphs]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graphs": [graph for graph in self.graphs if graph.is_portable]}


def _mode(graph: RewrittenGraph) -> Hashable:
    return graph.captured.binding.key, graph.training


def _whole(graph: RewrittenGraph, options: Options) -> dict[str, str]:
    """Return the paths of modules that decide and can be called as a whole, and why: no chain passes through them.

    Such a module takes its decision each time that it runs, and adds no path to the net's. A chain that lies inside of
    it is run as one of its own, if the module is a part of a step of another chain.
    """
    found: dict[str, str] = {}
    for decision in graph.decisions:
        path = join(options.within, decision.path)
        inside = {name: [is_inside(sum_, path) for sum_ in sums] for name, sums in graph.sums.items()}
        around = [name for name, sums in inside.items() if not any(sums)]
        is_in_step = any(is_inside(path, step) for name in around for step in graph.step_paths[name] if step)
        if decision.path and all(not any(sums) or (all(sums) and is_in_step) for sums in inside.values()):
            found[decision.path] = f"{DECISION} ({decision.line})"
    return found


def _count(graph: RewrittenGraph, without: Mapping[str, str] = _NONE) -> int:
    """Return the number of steps of a graph, but for those of chains inside of modules at some paths."""
    within = [join(graph.within, path) for path in without]
    chains = {name: sums for name, sums in graph.sums.items() if not any(is_inside(sums[0], path) for path in within)}
    return sum(map(len, chains.values()))


class DynamoRoute:
    """Has Dynamo capture a call of the model, once per set of conditions that Dynamo finds it to depend on.

    The first graph is for the sizes it was captured with, those of token ids aside; where another one changes, a graph
    follows that is for any value of it. (One for any size takes Dynamo minutes where a model cuts images into windows.)
    Numbers that are not tensors (attributes, arguments) are part of a graph, until there are so many graphs that one
    had better be for any value of those that changed.

    Args:
        net: the net.

    Attributes:
        graphs: the graphs that are kept, the one that was used last first.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self.graphs: list[RewrittenGraph] = []
        self._history: dict[Any, Any] = {}
        self._refused = False  # for the call that a graph was looked for last: a capture is made without caches

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RewrittenGraph | None:
        """Return the graph that serves a call, None if there is none."""
        self._refused = caches_weights(self._net)
        for position, graph in enumerate(() if self._refused else self.graphs):
            if graph.serves(self._net, args, kwargs):
                self.graphs.insert(0, self.graphs.pop(position))
                return graph
        return None

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options) -> RewrittenGraph:
        """Capture and rewrite a graph for a call.

        Raises:
            CaptureError: the model cannot be captured as one graph.
        """
        net = self._net
        refuse_shards(net)
        if self._refused:
            raise CaptureError(
                f"{type(net).__name__} is called inside of torch.nn.utils.parametrize.cached(), and a graph of "
                "TorchDynamo computes a parametrized tensor each time that it is read. Call it outside of cached()."
            )
        self.graphs = [graph for graph in self.graphs if graph.in_place()]
        with bare_submodules(net):
            captured = self._captured(args, kwargs, raises=options.may_change_function)
        if (steps := named_steps_of(net, options)) is not None:
            steps.mark(captured.graph)
        graph = rewrite_captured(net, captured, options, {})
        graph.shapes_known = True  # Dynamo captures with shapes
        return graph

    def _captured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, raises: bool) -> Captured:
        from mfx.capture.dynamo.call import capture_call, sizes_of_ids  # imports TorchDynamo, which takes a second

        call = partial(capture_call, self._net, args, kwargs, raises=raises)
        try:
            return call(history=self._history, any_float=len(self.graphs) >= _KEPT)
        except CaptureError:
            if not self.graphs and not sizes_of_ids(args, kwargs):
                raise
            return call(history=None, any_float=False)  # what cannot be said for other sizes can be for these

    def keep(self, graph: RewrittenGraph) -> None:
        """Keep a graph for later calls; the one that was used longest ago goes if there are many."""
        self.graphs = [graph, *self.graphs[: 4 * _KEPT - 1]]

    def __getstate__(self) -> dict[str, Any]:
        # What Dynamo saw cannot be pickled, and speaks of these very modules.
        return {**self.__dict__, "graphs": [], "_history": {}}
