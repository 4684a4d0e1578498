from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.find.normalize import is_tangled, normalize
from tests.passes.harness import Traced, code_of, traced


@fx.wrap
def set_entry(values: Any, index: int, value: float) -> None:
    """``values[index] = value``; a symbolic trace refuses it."""
    values[index] = value


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        view = y.view(-1)
        y.add_(1)
        y.mul_(2)
        set_entry(view, 0, 0)
        return y + view.sum()


def traced_in_place() -> Traced:
    case = traced(InPlace())
    (node,) = case.graph.find_nodes(op="call_function", target=set_entry)
    node.target, node.name = operator.setitem, "setitem"  # as TorchDynamo records it
    return case


def index_of(case: Traced) -> GraphIndex:
    return GraphIndex(case.graph, case.modules)


def test_later_readers_read_from_the_last_change() -> None:
    case = traced_in_place()
    assert is_tangled(index_of(case))
    normalize(index_of(case))
    add = case.node("add")
    assert add.args[0].name == "mul_"
    assert case.node("mul_").args[0].name == "add_"
    assert case.node("setitem").args[0].name == "view"
    value = torch.randn(2, 3)
    root = InPlace()
    assert torch.equal(torch.fx.GraphModule(root, case.graph)(value), root(value))


def test_normal_graphs_stay_as_they_are() -> None:
    case = traced(nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Linear(2, 2)))
    before = code_of(case.graph)
    assert not is_tangled(index_of(case))
    normalize(index_of(case))
    assert code_of(case.graph) == before


def test_normalizing_twice_is_normalizing_once() -> None:
    case = traced_in_place()
    normalize(index_of(case))
    assert not is_tangled(index_of(case))


class Masks(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        both = a & b
        return both ^ a | b


def test_operators_that_end_in_an_underscore_change_nothing() -> None:
    assert not is_tangled(index_of(traced(Masks())))


def test_a_family_is_all_that_shares_memory_and_was_there_before() -> None:
    case = traced_in_place()
    index = index_of(case)
    normalize(index)
    mutations = Mutations(index_of(case))

    def family(name: str) -> set[str]:
        (mutation,) = mutations.at([case.node(name)])
        return {node.name for node in mutation.family}

    assert family("add_") == {"exp", "view"}
    assert family("mul_") == {"exp", "view", "add_"}
    assert family("setitem") == {"exp", "view", "add_", "mul_"}
    touching = mutations.touching([case.node("view")])
    assert [mutation.node.name for mutation in touching] == ["add_", "mul_", "setitem"]


def test_sums_that_will_be_rewritten_have_memory_of_their_own() -> None:
    case = traced_in_place()
    index = index_of(case)
    normalize(index)
    index = index_of(case)
    (mutation,) = Mutations(index, {case.node("add_")}).at([case.node("mul_")])
    assert {node.name for node in mutation.family} == {"add_"}
