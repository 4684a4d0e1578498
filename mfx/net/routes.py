"""The two routes from a call to the rewritten graph that runs it; each keeps a table of the graphs it has found."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mfx import compat
from mfx.capture.arguments import bind, check_signature, key_of, specialize, specialize_defaults
from mfx.capture.captured import Captured, CaptureError, Specialization
from mfx.capture.named_steps import named_steps_of
from mfx.capture.symbolic.trace import capture
from mfx.modules.overlay import without_parts
from mfx.modules.restore import attributes_restored
from mfx.net.sharded import refuse_shards
from mfx.program.chain_call import holds_chain
from mfx.program.codegen import GraphCompiler
from mfx.program.rewritten import RewrittenGraph, rewrite_captured, steps_of
from mfx.program.shapes import find_with_shapes

if TYPE_CHECKING:
    RewrittenForward = Any


_KEPT = 8  # graphs per set of arguments; a model whose attributes follow a schedule needs a new one for every value

Run = Callable[[GraphCompiler], Any]


class SymbolicRoute:
    """Traces the model without running it, once per training mode and set of arguments that are no tensors.

    Args:
        owner: whose graphs these are.
    """

    def __init__(self, owner: RewrittenForward) -> None:
        self._owner = owner
        self._entries: dict[Hashable, list[RewrittenGraph]] = {}
        self._failures: dict[Hashable, str] = {}

    @property
    def entries(self) -> list[RewrittenGraph]:
        """Every graph there is, oldest first within a set of arguments."""
        return [entry for entries in self._entries.values() for entry in entries]

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[RewrittenGraph, Run]:
        """The graph that fits a call, and how to run it.

        Raises:
            CaptureError: there is none.
        """
        net, signature = self._owner.net, self._owner.__signature__
        arguments = bind(net, signature, args, kwargs)
        entry = self._entry(specialize(arguments))
        entry = entry if entry.shapes_known else self._probe(entry, arguments)
        return entry, partial(entry.run, net, arguments)

    def prepare(self) -> RewrittenGraph:
        """The graph for default arguments, made before any call.

        Raises:
            CaptureError: there is none.
        """
        check_signature(self._owner.net, self._owner.__signature__)
        return self._entry(specialize_defaults(self._owner.__signature__))

    def _entry(self, specialization: Specialization) -> RewrittenGraph:
        key = key_of(self._owner.net, specialization)
        for entry in self._entries.get(key, ()):
            if entry.holds():
                return entry
        self._forget_replaced_modules()
        entry = self._capture(key, specialization)
        self._owner.check_same_function(entry)
        if torch.compiler.is_exporting():
            return entry  # its constants may be tensors without values: it is for this once
        self._owner.adopt(entry)
        self._entries[key] = [*self._entries.get(key, ()), entry][-_KEPT:]
        return entry

    def _capture(self, key: Hashable, specialization: Specialization) -> RewrittenGraph:
        mode = key, self._owner.net.training
        if mode in self._failures:
            raise CaptureError(self._failures[mode])
        try:
            with (
                compat.patching(),
                compat.outside_of_export(),
                attributes_restored(self._owner.net) as marks,
                without_parts(self._owner.net),
            ):
                captured = capture(
                    self._owner.net, specialization, named_steps_of(self._owner.net, self._owner.options), holds_chain
                )
        except CaptureError as error:
            # else there is nothing to fall back on, or other conditions than in a call: try again
            if self._owner.options.capture != "symbolic" and not torch.compiler.is_exporting():
                self._failures[mode] = str(error)
            raise
        entry = rewrite_captured(self._owner.net, captured, self._owner.options, {}, marks)
        self._owner.mention_marks(entry)
        return entry

    def _forget_replaced_modules(self) -> None:
        for entries in self._entries.values():
            entries[:] = [entry for entry in entries if entry.in_place()]

    def _probe(self, entry: RewrittenGraph, arguments: Mapping[str, Any]) -> RewrittenGraph:
        """At an entry's first call, drop the steps that do not fit the shapes of real inputs."""
        if not (compat.runs_for_real() or torch.compiler.is_exporting()):
            return entry
        net, options = self._owner.net, self._owner.options
        # Nothing for autograd, nor for a checkpoint around this call, to save.
        with compat.outside_of_export(), torch.no_grad():
            found = find_with_shapes(net, entry.captured, options, arguments)
        rejections = {} if found is None else {rejection.node.name: rejection for rejection in found.rejections}
        steps = steps_of(entry.findings(net, options))
        rejected = {name: rejections[name] for name in steps if name in rejections}
        refused = {name: (rejection.refusal, rejection.facts) for name, rejection in rejected.items()}
        better = rewrite_captured(net, entry.captured, options, refused, entry.assigned) if refused else entry
        better.shapes_known = True
        for entries in self._entries.values():
            entries[:] = [better if old is entry else old for old in entries]
        for name, rejection in rejected.items():
            path = steps[name].path or "the model"
            self._owner.warn(f"the residual add {name} in {path} is left as it was: {rejection.reason}.")
        if found is not None:
            self._owner.check_same_function(better)
        return better


class DynamoRoute:
    """Lets Dynamo look at a call of the model, once per set of conditions that Dynamo finds it to depend on.

    The first graph is for the sizes it was captured with; where one of these changes, a graph follows that is for any
    value of it. (One for any value of any size, at once, takes Dynamo minutes where a model cuts images into windows.)
    Numbers that are no tensors (attributes, arguments) are part of a graph, until there are so many graphs that one had
    better be for any value of those that changed.

    Args:
        owner: whose graphs these are.
    """

    def __init__(self, owner: RewrittenForward) -> None:
        self._owner = owner
        self.entries: list[RewrittenGraph] = []
        self._history: dict[Any, Any] = {}

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[RewrittenGraph, Run]:
        """The graph that fits a call, and how to run it.

        Raises:
            CaptureError: there is none.
        """
        net = self._owner.net
        is_exporting = torch.compiler.is_exporting()
        entry = None if is_exporting else self._fitting(args, kwargs)
        if entry is None:
            entry = self._capture(args, kwargs)
            self._owner.check_same_function(entry)
            if is_exporting:
                return entry, partial(entry.call, net, args, kwargs)  # of tensors without values: it is for this once
            if not self._owner.is_part:
                self._owner.options.check_chains(entry.chain_lengths)
            self._owner.adopt(entry)
            self.entries = [entry, *self.entries[: 4 * _KEPT - 1]]
        return entry, partial(entry.call, net, args, kwargs)

    def _captured(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
        from mfx.capture.dynamo.call import capture_call  # imports TorchDynamo, which takes a second

        call = partial(capture_call, self._owner.net, args, kwargs)
        try:
            return call(history=self._history, any_float=len(self.entries) >= _KEPT)
        except CaptureError:
            if not self.entries:
                raise
            return call(history=None, any_float=False)  # what cannot be said for other sizes can be for these

    def _fitting(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RewrittenGraph | None:
        for position, entry in enumerate(self.entries):
            frame = entry.captured.frame
            if frame is not None and frame.holds(self._owner.net, args, kwargs):
                self.entries.insert(0, self.entries.pop(position))
                return entry
        return None

    def _capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RewrittenGraph:
        net, options = self._owner.net, self._owner.options
        refuse_shards(net)
        with compat.patching(), compat.outside_of_export(), without_parts(net):
            captured = self._captured(args, kwargs)
        if (steps := named_steps_of(net, options)) is not None:
            steps.mark(captured.graph)
        entry = rewrite_captured(net, captured, options, {}, {})
        entry.shapes_known = True  # Dynamo knows all shapes
        return entry

    def __getstate__(self) -> dict[str, Any]:
        # What Dynamo saw cannot be pickled, and speaks of these very modules.
        return {**self.__dict__, "entries": [], "_history": {}}
