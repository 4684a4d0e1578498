import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.fx import symbolic_trace

from mfx_passes import Selection, find_chains, to_networkx
from tests.passes.cases import D, Nested, Neutral, Plain, PostNorm, SideHead, SideOutputs, Taps
from tests.passes.harness import rewrite_model, rewritten, traced
from tests.passes.random_models import Model, models


def found(model, *inputs):
    case = traced(model, inputs)
    findings = find_chains(case.graph, case.modules)
    return case.graph, findings, to_networkx(case.graph, findings)


def inside(result):
    return to_networkx(result.graph, chains={f"momentum{i}": graphs for i, graphs in enumerate(result.chains)})


def chosen(view, **wanted):
    return [name for name, facts in view.nodes.items() if wanted.items() <= facts.items()]


def test_nodes_and_edges_are_those_of_the_graph():
    graph, _, view = found(SideHead())
    assert list(view) == [node.name for node in graph.nodes]
    assert set(view.edges) == {(s.name, node.name) for node in graph.nodes for s in node.all_input_nodes}
    for node in graph.nodes:
        assert view.nodes[node.name]["op"] == node.op


def test_targets_are_names():
    def forward(x):
        return getattr(torch.nn.functional.gelu(x).relu() + torch.cat([x, x]), "shape")  # noqa: B009

    graph = symbolic_trace(forward).graph
    targets = nx.get_node_attributes(to_networkx(graph), "target")
    assert list(targets.values()) == [
        "x",
        "torch.nn.functional.gelu",
        "relu",
        "torch.cat",
        "operator.add",
        "builtins.getattr",
        "output",
    ]


def test_a_tail_is_told_from_its_sum():
    _, findings, view = found(PostNorm())
    (chain,) = findings.chains
    for number, step in enumerate(chain.steps):
        assert chosen(view, step=number, role="sum") == [step.updates[0].add.node.name]
        assert chosen(view, step=number, role="tail") == [step.updates[0].out.name]
        (branch,) = chosen(view, step=number, role="branch")
        assert view.nodes[branch]["module"] == f"fs.{number}"
    assert chosen(view, chain=chain.name, role="skip") == ["x"]


def test_a_view_of_a_state_on_its_way_into_the_sum_is_a_skip():
    _, findings, view = found(Neutral())
    second = findings.chains[0].steps[1]
    assert (
        chosen(view, step=1, role="skip")
        == [node.name for node in sorted(second.nodes) if node is not second.updates[0].out][
            : len(second.updates[0].add.skip_path) - 1
        ]
    )


def test_the_innermost_chain_decides():
    _, findings, view = found(Nested())
    outer, *inner = findings.chains
    for chain in inner:
        for number, step in enumerate(chain.steps):
            assert view.nodes[step.updates[0].add.node.name]["chain"] == chain.name
            assert view.nodes[step.updates[0].add.node.name]["step"] == number
    assert {view.nodes[step.updates[0].add.node.name]["chain"] for step in outer.steps} == {outer.name}


def test_shapes_where_they_are_known():
    _, _, view = found(PostNorm(), torch.zeros(2, D))
    assert view.nodes["x"]["shape"] == f"(2, {D})"
    assert view.nodes["x"]["dtype"] == "float32"
    assert not {"shape", "dtype"} & found(PostNorm())[2].nodes["x"].keys()


def test_without_findings_there_are_no_roles():
    _, _, view = found(PostNorm())
    assert chosen(view, role="sum")
    assert not nx.get_node_attributes(to_networkx(traced(PostNorm()).graph), "role")


def test_a_momentum_call_is_one_node_or_shows_its_steps():
    result = rewrite_model(Plain())
    (chain,) = result.chains
    closed = to_networkx(result.graph)
    (call,) = chosen(closed, role="momentum call", chain=chain.name)
    assert list(closed) == [node.name for node in result.graph.nodes]
    view = inside(result)
    states = [f"{call}.{number}" for number in range(len(chain.steps))]
    assert chosen(view, role="sum", chain=chain.name, op="momentum_step") == states
    assert nx.is_path(view, ["x", *states, call])
    for number, state in enumerate(states):
        (branch,) = chosen(view, role="branch", step=number)
        assert view.nodes[branch]["module"] == chain.steps[number].path
        assert nx.is_path(view, [["x", *states][number], branch, state])


def test_a_tap_is_read_from_its_state():
    result = rewrite_model(Taps())
    (chain,) = result.chains
    view = inside(result)
    (call,) = chosen(view, role="momentum call")
    assert chain.taps
    for t, _ in chain.taps:
        (reader,) = set(view.successors(f"{call}.{t - 1}")) - set(chosen(view, step=t))
        assert view.nodes[reader]["target"] == "operator.getitem"


def test_side_outputs_are_read_from_the_branch():
    result = rewrite_model(SideOutputs())
    view = inside(result)
    read = {reader for name in chosen(view, role="branch") for reader in view.successors(name)}
    assert any(view.nodes[reader]["op"] == "call_function" and "role" not in view.nodes[reader] for reader in read)


def test_calls_inside_of_branches_show_their_steps_too():
    result = rewrite_model(Nested())
    view = inside(result)
    assert len(chosen(view, role="momentum call")) == len(result.chains) == 3
    assert {view.nodes[name]["chain"] for name in chosen(view, role="sum")} == {c.name for c in result.chains}


@pytest.mark.parametrize("model", [SideHead, Nested, PostNorm, SideOutputs])
def test_graphml_takes_it(model, tmp_path):
    views = found(model())[2], inside(rewrite_model(model()))
    for view in views:
        nx.write_graphml(view, tmp_path / "view.graphml")
        read = nx.read_graphml(tmp_path / "view.graphml")
        assert (read.nodes, read.edges) == (view.nodes, view.edges)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models())
def test_a_rewritten_graph_is_acyclic_and_its_chains_are_paths(specs):
    result = rewritten(traced(Model(specs)), Selection())
    view = inside(result)
    assert nx.is_directed_acyclic_graph(view)
    for call in chosen(view, role="momentum call"):
        states = [name for name in chosen(view, op="momentum_step") if name.rpartition(".")[0] == call]
        assert nx.is_path(view, [*states, call])
