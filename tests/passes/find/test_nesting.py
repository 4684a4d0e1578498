from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, fx, nn

from mfx_passes import find_chains
from mfx_passes.find.nesting import Nesting
from tests.passes.harness import rewritten, traced
from tests.passes.random_models import ChainSpec, Model, models

RANDOM = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


class Inner(nn.Module):
    """A branch with two steps of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        y = y + y.exp()
        y = y + y.cos()
        return y.tan()


class Outer(nn.Module):
    """Two steps, the first of which has a chain inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.inner(x)
        return x + x.exp()


class Nested(nn.Module):
    """A step that holds a step that holds a chain, and another step."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outer(x.relu())
        return x + x.exp()


def data_flow(graph: fx.Graph) -> nx.DiGraph:
    """An edge from every node to each of its readers."""
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((node, user) for node in graph.nodes for user in node.users)
    return flow


def test_three_levels() -> None:
    case = traced(Nested())
    outermost, outer, inner = find_chains(case.graph, case.modules).chains
    nesting = Nesting([outermost, outer, inner])
    assert nesting.chains == [outermost, outer, inner]
    assert [nesting.around(chain) for chain in (outermost, outer, inner)] == [
        [],
        [outermost.steps[0]],
        [outer.steps[0], outermost.steps[0]],
    ]
    node = inner.steps[1].outs[0]
    assert nesting.innermost(node) is inner.steps[1]
    assert nesting.holders(node) == [inner.steps[1], outer.steps[0], outermost.steps[0]]
    assert nesting.holders(case.node("x")) == []


def test_a_chain_partly_inside_a_step_is_not_added() -> None:
    case = traced(Nested())
    outermost, outer, inner = find_chains(case.graph, case.modules).chains
    inner.steps[0].nodes.add(outermost.steps[1].outs[0])
    nesting = Nesting([outermost, outer])
    assert not nesting.add(inner)
    assert inner not in nesting.forest
    with pytest.raises(AssertionError):
        Nesting([outermost, outer, inner])


@RANDOM
@given(models())
def test_nesting_is_a_forest_that_says_which_step_owns_which_nodes(specs: tuple[ChainSpec, ...]) -> None:
    case = traced(Model(specs))
    chains = find_chains(case.graph, case.modules).chains
    nesting = Nesting(chains)
    assert not chains or nx.is_forest(nesting.forest)
    assert nesting.chains == chains
    steps = [step for chain in chains for step in chain.steps]
    for chain in chains:
        around = [step for step in steps if chain.nodes < step.nodes]
        assert nesting.around(chain) == sorted(around, key=lambda step: len(step.nodes))
        assert nx.ancestors(nesting.forest, chain) & {*steps} == {*around}
    order = {chain: place for place, chain in enumerate(chains)}
    assert all(order[a] < order[b] for a in order for b in nx.descendants(nesting.forest, a) & {*order})


@RANDOM
@given(models())
def test_chains_are_paths_and_rewritten_graphs_have_no_cycle(specs: tuple[ChainSpec, ...]) -> None:
    torch.manual_seed(0)
    case = traced(Model(specs))
    found = find_chains(case.graph, case.modules)
    flow = data_flow(found.graph)
    for chain in found.chains:
        for states, after in pairwise(chain.states):
            assert all(nx.has_path(flow, one, other) for one, other in zip(states, after, strict=True))
    result = rewritten(case)
    assert nx.is_directed_acyclic_graph(data_flow(result.graph))
    for graphs in result.chains:
        assert all(nx.is_directed_acyclic_graph(data_flow(step.original)) for step in graphs.steps)
