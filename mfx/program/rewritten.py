"""A captured and rewritten graph of a net, with the conditions under which it holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from mfx import compat
from mfx.capture.captured import Captured
from mfx.capture.decisions import Decision
from mfx.capture.guards import HOLDS, Guard
from mfx.modules.overlay import MARK
from mfx.modules.state_lock import StateLock
from mfx.options.gamma import Gamma
from mfx.options.options import Options
from mfx.program.assembly import Assembly
from mfx.program.chain_call import Momentum
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.record import Chains, Record, steps_of, unwrapped
from mfx.program.scope import Scope
from mfx_passes import Findings, StepGraphs, find_chains, paths
from mfx_passes.ir import Grounds, Selection, block_of, enclosing_path
from mfx_passes.rewrite.portable_graph import PortableGraph, is_portable


def is_observed(module: nn.Module) -> bool:
    """True if a call of a module does more than its forward: it has hooks, or was compiled."""
    return any(map(bool, compat.hook_tables(module))) or compat.is_compiled(module)


def _defaults() -> tuple[torch.dtype, torch.device]:
    return torch.get_default_dtype(), compat.default_device()


@dataclass(eq=False)
class RewrittenGraph:
    """A rewritten graph, and the function it stands for.

    Args:
        captured: the graph as the model wrote it.
        graph: the rewritten graph.
        calls: the momentum calls of the graph, by the name the graph calls them.
        flat: paths of modules whose own ``forward`` does not run, because their nodes belong to several steps.
        steps: module paths of the steps in its chains, by the names of their sums.
        refused: sums that do not fit now that shapes are known, with the grounds.
        training: the training mode of the net it was made in.
        guards: the conditions under which it holds.
        within: path in the net of the submodule that the graph is of.
        shapes_known: True once the chains were checked against shapes.
        recompute_between: True if what lies between the chains is recomputed in the backward pass, too.
        verify: the reaction if that recomputation was not reproducible.
        traced: the chains before they were checked against shapes; None if there was no such time.
        defaults: torch's default dtype and device in the trace: constants that the model made then are of these.
        evaluated: names of the chains whose steps were in evaluation in the capture.
        opened: modules that are not called as a whole, so that blocks in them are recomputed one by one.
        last_use: grows with every call whose conditions were those of the graph; 0 if none was.
    """

    captured: Captured
    graph: PortableGraph
    calls: dict[str, Momentum]
    flat: tuple[str, ...]
    steps: dict[str, str]
    refused: dict[str, Grounds]
    training: bool
    guards: list[Guard]
    within: str = ""
    shapes_known: bool = False
    recompute_between: bool = False
    verify: str = "warn"
    traced: Chains | None = None
    defaults: tuple[torch.dtype, torch.device] = field(default_factory=_defaults)
    last_use: int = 0
    evaluated: frozenset[str] = frozenset()
    opened: tuple[nn.Module, ...] = ()
    _functions: dict[GraphCompiler, Callable[..., Any]] = field(default_factory=dict, repr=False)

    @property
    def mode(self) -> str:
        """The training mode that it is for, ``"train"`` or ``"eval"``."""
        return "train" if self.training else "eval"

    @property
    def is_portable(self) -> bool:
        """True if the graph can be pickled and copied; what Dynamo saw cannot, and speaks of these very modules."""
        return not self.captured.binding.guards_modules and is_portable(self.captured.graph, self.captured.calls)

    @property
    def decisions(self) -> Sequence[Decision]:
        """The conditions on values that the graph checks as it runs."""
        return self.captured.decisions

    def is_on(self, path: Sequence[Decision]) -> bool:
        """True if its conditions begin with the values of these."""
        mine = self.decisions[: len(path)]
        return [decision.value for decision in mine] == [decision.value for decision in path]

    @property
    def chain_lengths(self) -> dict[str, int]:
        """The number of steps of each chain, by name."""
        return {call.chain: len(call.graphs.steps) for call in self.calls.values()}

    @property
    def updates(self) -> dict[str, int]:
        """The number of updates of each chain, by name."""
        return {call.chain: sum(call.graphs.updates) for call in self.calls.values()}

    @property
    def chains(self) -> Chains:
        """Path and kind of the steps of each chain, by name."""
        return {call.chain: [steps_of(call.graphs.steps)] for call in self.calls.values()}

    @property
    def record(self) -> Record:
        """The chains, to compare with others."""
        return Record(self.chains if self.shapes_known else None, self.traced, self._computed, self._beside)

    @property
    def moving(self) -> set[str]:
        """Names of the chains with γ ≠ 0 in the modes that their modules had in the capture."""
        return {chain for chain, gamma in self._gammas.items() if not gamma.is_zero}

    @property
    def steady(self) -> set[str]:
        """Those of the moving chains that move in evaluation, too, for their γ has no signs."""
        return {chain for chain, gamma in self._gammas.items() if not gamma.in_evaluation.is_zero}

    @property
    def _gammas(self) -> dict[str, Gamma]:
        calls = {call.chain: call.gamma for call in self.calls.values()}
        return {c: gamma.in_evaluation if c in self.evaluated else gamma for c, gamma in calls.items()}

    @property
    def chain_targets(self) -> tuple[str, ...]:
        """Paths of the modules and tensors that the steps of the chains read."""
        return tuple(target for call in self.calls.values() for step in call.graphs.steps for target in step.targets)

    @property
    def containers(self) -> set[str]:
        """Paths of the modules that runs of the steps make up."""
        return {container.path for call in self.calls.values() for container in call.graphs.containers}

    @property
    def sums(self) -> dict[str, list[str]]:
        """For each chain, the paths in the net of the modules whose forwards add up its steps."""
        return {
            call.chain: [p for step in call.graphs.steps for p in self._paths_of_sums(step)]
            for call in self.calls.values()
        }

    @property
    def step_paths(self) -> dict[str, list[str]]:
        """For each chain, the paths in the net of its steps; of each update where a step has several."""
        return {
            call.chain: [paths.join(self.within, p) for step in call.graphs.steps for p in step.paths or (step.path,)]
            for call in self.calls.values()
        }

    def _paths_of_sums(self, step: StepGraphs) -> list[str]:
        (output,) = step.original.find_nodes(op="output")
        return [paths.join(self.within, enclosing_path(node)) for node in output.args[0][: len(step.writes)]]

    @cached_property
    def nests(self) -> bool:
        """True if a step of one of its chains runs another chain."""
        return any(call.nests for call in self.calls.values())

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths in the net of the blocks in no chain that are recomputed, each on its own."""
        found = (None if self.recompute_between else block_of(node) for node in self.graph.nodes)
        return tuple(dict.fromkeys(paths.join(self.within, path) for path in found if path is not None))

    @property
    def recomputes_more(self) -> bool:
        """True if more than the steps of its chains is recomputed: what lies between them, or blocks there."""
        return self.recompute_between or bool(self.blocks)

    @property
    def changes_function(self) -> bool:
        """True if one of its chains computes another function than the model."""
        return bool(self.moving)

    @property
    def called_modules(self) -> set[str]:
        """Paths of the modules that the graph, or a step of its chains, calls as a whole."""
        steps = [step.original for call in self.calls.values() for step in call.graphs.steps]
        return {str(node.target) for graph in (self.graph, *steps) for node in graph.find_nodes(op="call_module")}

    @cached_property
    def _computed(self) -> frozenset[str]:
        """Paths in the net of all modules that nodes of the graph lie in."""
        return frozenset(chain.from_iterable(map(paths.ancestors, self._paths_of(self.captured.graph.nodes))))

    @cached_property
    def _beside(self) -> frozenset[str] | None:
        """Paths in the net of the modules that compute in no chain; None of a stretch: its call has others."""
        no_work = {*self.calls, operator.getitem}
        nodes = [node for node in self.graph.nodes if node.op.startswith("call") and node.target not in no_work]
        return None if self.captured.partial else frozenset(self._paths_of(nodes))

    def _paths_of(self, nodes: Iterable[fx.Node]) -> set[str]:
        return {unwrapped(paths.join(self.within, enclosing_path(node))) for node in nodes}

    def computes(self, path: str) -> bool:
        """True if the module at this path in the net has a share in the graph."""
        return unwrapped(path) in self._computed

    def serves(self, net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """True if the graph is one for this call."""
        binding = self.captured.binding
        return binding.holds(net, args, kwargs) and (binding.guards_modules or self.holds())

    def holds(self) -> bool:
        """True if the modules that the capture walked through, and torch's defaults, are as they were."""
        if self.captured.binding.guards_modules:
            return self.in_place()  # the model may set their attributes
        if _defaults() != self.defaults:
            return False
        return all(map(HOLDS, self.guards)) and not any(map(is_observed, self.opened))

    def in_place(self) -> bool:
        """True if these modules are still in place, in any training mode."""
        return all(guard.in_place() for guard in self.guards)

    def __call__(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler = to_function
    ) -> Any:
        """Run the rewritten graph on the modules of ``net``, by functions that ``compiler`` makes."""
        if compiler not in self._functions:
            assembly = Assembly(
                self.graph, self.calls, compiler, recompute_between=self.recompute_between, verify=self.verify
            )
            graph_function = partial(assembly, Scope(self.captured.modules, net))
            self._functions[compiler] = self.captured.binding.function(graph_function)
        return self._functions[compiler](net, *args, **kwargs)

    def graph_module(self, net: nn.Module, class_name: str = "") -> fx.GraphModule:
        """Return the rewritten graph as a module of its own, over the modules of ``net``, by default with its name."""
        root = nn.Module()
        ours = {"forward", MARK, "graph", "code"}
        root.__dict__.update({key: value for key, value in net.__dict__.items() if key not in ours})
        root._modules = {**net._modules, **self.captured.modules, **self.calls}
        module = fx.GraphModule(root, self.graph.__deepcopy__(), class_name=class_name or type(net).__name__)
        module.training = self.training  # not train(): the modules in it are the net's
        return module

    def findings(self, net: nn.Module, options: Options) -> Findings:
        """Find chains in the captured graph anew."""
        graph, _ = self.captured.copy()  # which has the values' shapes, as the graph had that was rewritten
        return find_chains(graph, self.captured.modules_of(net), selection_of(options, self.captured, self.refused))

    def use_lock(self, lock: StateLock) -> None:
        """Let the chains hold the lock of a net when they run."""
        for call in self.calls.values():
            call.settings = replace(call.settings, lock=lock)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_functions": {}}


def selection_of(options: Options, captured: Captured, refused: Mapping[str, Grounds]) -> Selection:
    """Return the residual adds of a captured graph that may be rewritten."""
    return replace(
        options.selection, refused=dict(refused), forward_only=captured.forward_only, partial=captured.partial
    )
