"""What lies between the chains (stems, projection blocks, heads), run again in the backward pass piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Interpreter, Node
from torch.utils._pytree import tree_iter

from mfx.engine import ARITHMETICS, ChainCache, ChainPlan, ChainSettings, StepCost, StepFunction, measure, run_chain
from mfx.engine.memory.cuts import NodeCost, SegmentCost
from mfx.engine.memory.measure import StepMeasure, storages_by_address
from mfx.options.gamma import Gamma
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.memory_plans import share_of
from mfx.program.scope import Scope
from mfx.program.segments import split_between_calls
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.paths import resolve

_AGAIN = ChainPlan(frozenset(), from_inputs=True)


class BetweenChains:
    """A run of nodes between two chains as a function of ``(root, *inputs)``.

    In the first pass that the net's plan is made of it runs again as a whole; from then on in pieces, each of which
    keeps its inputs or, as far as the budget goes, its activations. A piece is a chain of one step at γ = 0.

    Args:
        body: the nodes as a graph of their own.
        compiler: what makes functions of graphs.
        verify: see `ChainSettings`.
    """

    def __init__(self, body: Graph, compiler: GraphCompiler, verify: str) -> None:
        self._body, self._compiler, self._verify = body, compiler, verify
        self._plain = compiler(body)
        self._pieces: dict[tuple[int, ...], tuple[Callable[..., Any], dict[str, _Piece]]] = {}
        self._repeatable: bool | None = None
        names = [node.name for node in body.nodes if node.op not in ("placeholder", "get_attr", "output")]
        self._name = f"between the chains, {names[0]} to {names[-1]}" if names else "between the chains"
        self._roots = tuple(dict.fromkeys(target.split(".")[0] for target in _targets(body)))
        self._measured = _Measured(body)
        self._whole = _Piece(self._measured, _targets(body), self._name, verify)

    def __call__(self, root: Any, *inputs: Any) -> Any:
        """What the nodes compute."""
        # As for a chain: what is read by path is put back for a second run in here, not in the model.
        root = Scope({name: getattr(root, name) for name in self._roots})
        share = share_of((self._name, *map(_shape, inputs)), None)
        if share is None or not self._can_be_repeated(root):
            return self._plain(root, *inputs)
        if share.plan is None:
            outputs = self._whole.run_again(root, inputs, share.costs)
            if share.costs:
                share.run = self._measured.found
            return outputs
        function, pieces = self._cut(share.cuts)
        calls = {name: partial(piece.run, root, i in share.plan.kept) for i, (name, piece) in enumerate(pieces.items())}
        return function(Scope(calls, root), *inputs)

    def _can_be_repeated(self, root: Any) -> bool:
        """Not if it changes an input in place: the second run would find it changed."""
        if self._repeatable is None:
            targets = {str(node.target) for node in self._body.find_nodes(op="call_module")}
            index = GraphIndex(self._body, {target: resolve(root, target) for target in targets})
            changes = Mutations(index).at(index.nodes)
            self._repeatable = not any(node.op == "placeholder" for change in changes for node in change.family)
        return self._repeatable

    def _cut(self, cuts: tuple[int, ...]) -> tuple[Callable[..., Any], dict[str, _Piece]]:
        if cuts not in self._pieces:
            nodes = _computed(self._body)
            edges = [0, *cuts, len(nodes)]
            runs = [nodes[first:end] for first, end in pairwise(edges)]
            short, pieces = split_between_calls(self._body, self._piece, runs)
            self._pieces[cuts] = to_function(short), pieces
        return self._pieces[cuts]

    def _piece(self, body: Graph) -> _Piece:
        nodes = _computed(body)
        name = f"between the chains, {nodes[0].name} to {nodes[-1].name}"
        return _Piece(self._compiler(body), _targets(body), name, self._verify)


class _Piece:
    """Nodes that run again together."""

    def __init__(self, function: Any, targets: tuple[str, ...], name: str, verify: str) -> None:
        self.function = function
        self._targets, self._name = targets, name
        self._settings = ChainSettings(Gamma(0, 1), ARITHMETICS["exact"], verify=verify, plan=_AGAIN)
        self._steps: dict[tuple[int, int], StepFunction] = {}
        self._cache: ChainCache = {}

    def run(self, root: Any, keep: bool, *inputs: Any) -> Any:
        """Run it, and keep its activations or its inputs."""
        return self.function(root, *inputs) if keep else self.run_again(root, inputs, None)

    def run_again(self, root: Any, inputs: Sequence[Any], costs: list[StepCost] | None) -> Any:
        """Run it so that it runs again in the backward pass."""
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        position = next((i for i in tensors if inputs[i].requires_grad), tensors[0] if tensors else None)
        if position is None:
            return self.function(root, *inputs)
        others = (*inputs[:position], *inputs[position + 1 :])
        result = run_chain(
            self._name,
            [self._step(position, len(others))],
            inputs[position],
            others,
            root,
            self._settings,
            cache=self._cache,
            costs=costs,
        )
        return result.sides[0]

    def _step(self, position: int, others: int) -> StepFunction:
        """As a step whose stream is one of the inputs, and whose value is the first of its outputs that is a tensor."""
        if (position, others) not in self._steps:

            def call(root: Any, x: Tensor, *rest: Any) -> tuple[Any, ...]:
                outputs = self.function(root, *rest[:position], x, *rest[position:])
                return next((value for value in outputs if isinstance(value, Tensor)), None), *outputs

            captures = tuple(range(others))
            self._steps[position, others] = StepFunction(self._name, "residual", call, call, captures, self._targets)
        return self._steps[position, others]


class _Measured:
    """The nodes of a run, one by one; ``found`` is what they cost if somebody measures."""

    def __init__(self, body: Graph) -> None:
        self._body = body
        self.found: SegmentCost | None = None

    def __call__(self, root: Any, *inputs: Any) -> Any:
        step = measure()
        if step is None:
            return _Nodes(root, self._body).run(*inputs)
        nodes = _MeasuredNodes(root, self._body, step)
        outputs = nodes.run(*inputs)
        self.found = nodes.found()
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
        found = self._step.hold(leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor))
        if n.op == "placeholder":
            found = found if any(t.requires_grad for t in tree_iter(value) if isinstance(t, Tensor)) else {}
        if n.op in ("placeholder", "get_attr", "output"):
            self._values[n.name] = found if n.op == "placeholder" else {}
            return value
        self._values[n.name] = found
        reads = tuple(source.name for source in n.all_input_nodes if source.op != "get_attr")
        self._costs[n.name] = NodeCost(self._step.group(), reads, self._step.flops - flops, changed)
        return value

    def found(self) -> SegmentCost:
        (output,) = self.graph.find_nodes(op="output")
        read = frozenset(node.name for node in output.all_input_nodes)
        return SegmentCost(tuple(self._costs.values()), self._values, tuple(self._costs), read)

    def _versions(self, n: Node) -> dict[int, int]:
        values = [self.env[source] for source in n.all_input_nodes]
        tensors = [leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor) and not leaf.is_inference()]
        return {key: tensor._version for tensor in tensors for key in storages_by_address(tensor)}


def _targets(body: Graph) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(n.target) for n in body.nodes if n.op in ("call_module", "get_attr")))


def _computed(body: Graph) -> list[Node]:
    return [node for node in body.nodes if node.op not in ("placeholder", "get_attr", "output")]


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.requires_grad) if isinstance(value, Tensor) else type(value)
