"""Recomputes what lies between the chains (stems, projection blocks, heads), piece by piece; or a block there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node
from torch.utils._pytree import tree_iter

from mfx.engine import (
    ChainCache,
    ChainPlan,
    ChainSettings,
    Phase,
    StepCost,
    StepFunction,
    mark_gradients,
    measure,
    run_chain,
)
from mfx.engine.memory.cuts import NodeCost, SegmentCost
from mfx.engine.memory.measure import StepMeasure
from mfx.engine.offload import Offload
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.memory_plans import ChainShare, share_of
from mfx.program.scope import Scope
from mfx.program.segments import split_between_calls
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.ops.gradients import differentiates
from mfx_passes.paths import resolve

_RECOMPUTED = ChainPlan(frozenset(), from_inputs=True)


class BetweenChains:
    """The segment of a graph between two chains, as a function of ``(root, *inputs)``.

    In the forward pass from which the net's plan is made, the segment is recomputed as a whole. From then on it runs in
    pieces, each of which keeps its inputs or, as far as the budget allows, its activations. A piece is a chain of one
    step at γ = 0.

    Args:
        body: the segment's nodes as a graph of their own.
        compiler: makes functions of graphs.
        settings: those of a piece; with ``offload``, its inputs lie in host memory.
        always: recompute the segment as a whole where there is no plan; else it then keeps its activations.
    """

    def __init__(self, body: Graph, compiler: GraphCompiler, settings: ChainSettings, *, always: bool = False) -> None:
        self._body, self._compiler, self._offloads, self._always = body, compiler, settings.offload, always
        self._settings = replace(settings, plan=_RECOMPUTED, offload=False)
        self._plain = compiler(body)
        self._pieces: dict[tuple[int, ...], tuple[Callable[..., Any], dict[str, _Piece]]] = {}
        self._repeatable: bool | None = None
        names = [node.name for node in body.nodes if node.op not in ("placeholder", "get_attr", "output")]
        self._name = f"between the chains, {names[0]} to {names[-1]}" if names else "between the chains"
        self._roots = tuple(dict.fromkeys(target.split(".")[0] for target in _targets(body)))
        self._measured = _Measured(body)
        self._whole = _Piece(self._measured, _targets(body), self._name, self._settings)
        self._unplanned = _Piece(self._plain, _targets(body), self._name, self._settings)

    def __call__(self, root: Any, *inputs: Any) -> Any:
        """Return the values of the segment's outputs."""
        # As for a chain: recomputation restores what is read by path in this scope, not in the model.
        root = Scope({name: getattr(root, name) for name in self._roots})
        with share_of((self._name, *map(_shape, inputs)), _no_states) as share:
            if (share is None and not self._always) or not self._is_repeatable(root):
                return self._plain(root, *inputs)
            with self._offload(inputs) or nullcontext() as offload:
                return self._run(root, inputs, share, offload)

    def _run(self, root: Any, inputs: Sequence[Any], share: ChainShare | None, offload: Offload | None) -> Any:
        if share is None:
            return self._unplanned.run_recomputed(root, inputs, None, offload)
        if share.plan is None:
            outputs = self._whole.run_recomputed(root, inputs, share.costs, offload)
            if share.costs:
                share.segment = self._measured.cost
            return outputs
        function, pieces = self._cut(share.cuts)
        calls = {name: partial(piece.run, root, share, i, offload) for i, (name, piece) in enumerate(pieces.items())}
        return function(Scope(calls, root), *inputs)

    def _offload(self, inputs: Sequence[Any]) -> Offload | None:
        """Return what moves the inputs of this call's pieces; the caller may hold those that autograd did not make."""
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if not (self._offloads and tensors and torch.is_grad_enabled()):
            return None
        held = [tensor for tensor in tensors if tensor.grad_fn is None]
        return Offload.of(self._name, tensors[0].device, held)

    def _is_repeatable(self, root: Any) -> bool:
        """True unless the segment changes an input in place, or differentiates.

        Recomputation would start from the changed input, and without the history of the others.
        """
        if self._repeatable is None:
            targets = {str(node.target) for node in self._body.find_nodes(op="call_module")}
            index = GraphIndex(self._body, {target: resolve(root, target) for target in targets})
            changes = Mutations(index).at(index.nodes)
            changed = any(node.op == "placeholder" for change in changes for node in change.family)
            self._repeatable = not changed and not any(differentiates(node, index.modules) for node in index.nodes)
        return self._repeatable

    def _cut(self, cuts: tuple[int, ...]) -> tuple[Callable[..., Any], dict[str, _Piece]]:
        if cuts not in self._pieces:
            nodes = _computed(self._body)
            edges = [0, *cuts, len(nodes)]
            runs = [nodes[first:end] for first, end in pairwise(edges) if first < end]  # none, if it only reads
            short, pieces = split_between_calls(self._body, self._piece, runs)
            self._pieces[cuts] = to_function(short), pieces
        return self._pieces[cuts]

    def _piece(self, body: Graph) -> _Piece:
        nodes = _computed(body)
        name = f"between the chains, {nodes[0].name} to {nodes[-1].name}"
        return _Piece(self._compiler(body), _targets(body), name, self._settings)


class _Piece:
    """Nodes that are recomputed together."""

    def __init__(self, function: Any, targets: tuple[str, ...], name: str, settings: ChainSettings) -> None:
        self.function = function
        self._targets, self._name, self._settings = targets, name, settings
        self._steps: dict[tuple[int, int], StepFunction] = {}
        self._cache: ChainCache = {}

    def run(self, root: Any, share: ChainShare, number: int, offload: Offload | None, *inputs: Any) -> Any:
        """Run the piece with this number, and keep its activations or its inputs, as the segment's plan says."""
        keeps = share.plan is not None and number in share.plan.kept
        if share.mark is not None:
            share.mark(number, Phase.RUN)
        outputs = self.function(root, *inputs) if keeps else self.run_recomputed(root, inputs, None, offload)
        if share.mark is not None:
            share.mark(number, Phase.DONE)
            mark_gradients(share.mark, number, [t for t in tree_iter(outputs) if isinstance(t, Tensor)][:1])
        return outputs

    def run_recomputed(
        self, root: Any, inputs: Sequence[Any], costs: list[StepCost] | None, offload: Offload | None
    ) -> Any:
        """Run the piece, keep its inputs, and let the backward pass recompute it."""
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        position = next((i for i in tensors if inputs[i].requires_grad), tensors[0] if tensors else None)
        if position is None:
            return self.function(root, *inputs)
        others = (*inputs[:position], *inputs[position + 1 :])
        with nullcontext() if offload is None else offload.group():
            result = run_chain(
                self._name,
                [self._step(position, len(others))],
                [inputs[position]],
                others,
                root,
                self._settings,
                cache=self._cache,
                costs=costs,
            )
        return result.sides[0]

    def _step(self, position: int, others: int) -> StepFunction:
        """Return the piece as a step: its stream is one of the inputs, its value the first output that is a tensor."""
        if (position, others) not in self._steps:

            def call(root: Any, x: Tensor, *rest: Any) -> tuple[Any, ...]:
                outputs = self.function(root, *rest[:position], x, *rest[position:])
                return next((value for value in outputs if isinstance(value, Tensor)), None), *outputs

            captures = tuple(range(others))
            self._steps[position, others] = StepFunction(self._name, ("residual",), call, call, captures, self._targets)
        return self._steps[position, others]


class _Measured:
    """The nodes of a segment, run one by one; ``cost`` is their cost if a measure was active."""

    def __init__(self, body: Graph) -> None:
        self._body = body
        self.cost: SegmentCost | None = None

    def __call__(self, root: Any, *inputs: Any) -> Any:
        step = measure()
        if step is None:
            return _Nodes(root, self._body).run(*inputs)
        nodes = _MeasuredNodes(root, self._body, step)
        outputs = nodes.run(*inputs)
        self.cost = nodes.cost()
        return outputs


class _Nodes(Interpreter):
    def __init__(self, root: Any, body: Graph) -> None:
        super().__init__(nn.Module(), graph=body)
        self._root = root

    def fetch_attr(self, target: str) -> Any:
        return resolve(self._root, target)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return resolve(self._root, target)(*args, **kwargs)


class _MeasuredNodes(_Nodes):
    def __init__(self, root: Any, body: Graph, step: StepMeasure) -> None:
        super().__init__(root, body)
        self._step = step
        self._costs: dict[str, NodeCost] = {}
        self._values: dict[str, dict[int, int]] = {}

    def run_node(self, n: Node) -> Any:
        before = self._versions(n)
        flops = self._step.flops
        self._step.begin_group()
        value = super().run_node(n)
        changed = frozenset(key for key, version in self._versions(n).items() if before[key] != version)
        found = self._step.sizes(tree_iter(value))
        if n.op == "placeholder":
            found = found if any(t.requires_grad for t in tree_iter(value) if isinstance(t, Tensor)) else {}
        if n.op in ("placeholder", "get_attr", "output"):
            self._values[n.name] = found if n.op == "placeholder" else {}
            return value
        self._values[n.name] = found
        reads = tuple(source.name for source in n.all_input_nodes if source.op != "get_attr")
        self._costs[n.name] = NodeCost(self._step.group(), reads, self._step.flops - flops, changed)
        return value

    def cost(self) -> SegmentCost:
        (output,) = self.graph.find_nodes(op="output")
        read = frozenset(node.name for node in output.all_input_nodes)
        return SegmentCost(tuple(self._costs.values()), self._values, tuple(self._costs), read)

    def _versions(self, n: Node) -> dict[int, int]:
        values = [self.env[source] for source in n.all_input_nodes]
        tensors = [leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor) and not leaf.is_inference()]
        return {key: tensor._version for tensor in tensors for key in self._step.keys.sizes([tensor])}


def _no_states() -> None:
    """Return that a segment keeps the inputs of its pieces in any case."""


def _targets(body: Graph) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(n.target) for n in body.nodes if n.op in ("call_module", "get_attr")))


def _computed(body: Graph) -> list[Node]:
    return [node for node in body.nodes if node.op not in ("placeholder", "get_attr", "output")]


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.requires_grad) if isinstance(value, Tensor) else type(value)
