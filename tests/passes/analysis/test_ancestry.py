import networkx as nx
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from mfx_passes import to_networkx
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ops.sums import terms


@st.composite
def graphs(draw):
    """Graphs of sums, of functions of one or several values, and of sizes, which are no values."""
    graph = Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(1, 20))):
        pick = st.sampled_from(nodes)
        kind = draw(st.sampled_from(["sum", "sum", "function", "join", "size"]))
        if kind == "sum":
            nodes.append(graph.call_function(torch.add, (draw(pick), draw(pick))))
        elif kind == "function":
            nodes.append(graph.call_function(torch.relu, (draw(pick),)))
        elif kind == "join":
            nodes.append(graph.call_function(torch.cat, (draw(st.lists(pick, min_size=1, max_size=3)),)))
        else:
            size = graph.call_method("size", (draw(pick), 0))
            nodes.append(graph.call_function(torch.narrow, (draw(pick), 0, 0, size)))
    graph.output(nodes[-1])
    return graph


def is_watched(node: Node) -> bool:
    return len(node.users) > 1 or terms(node) is not None or any(map(terms, node.users))


@given(graphs())
def test_ancestors_are_those_that_a_path_leads_from(graph):
    index = GraphIndex(graph, {})
    flow = to_networkx(graph)
    flow.remove_nodes_from([node.name for node in index.sizes])
    values = [node for node in graph.nodes if node not in index.sizes]
    for node in filter(is_watched, values):
        for other in values:
            assert index.is_ancestor(node, other) == nx.has_path(flow, node.name, other.name)


@given(graphs(), st.data())
def test_common_ancestors_are_those_of_both(graph, data):
    index = GraphIndex(graph, {})
    flow = to_networkx(graph)
    flow.remove_nodes_from([node.name for node in index.sizes])
    values = [node for node in graph.nodes if node not in index.sizes]
    a, b = data.draw(st.sampled_from(values)), data.draw(st.sampled_from(values))
    computed = [node for node in values if is_watched(node) and node.op != "placeholder"]
    both = [n for n in computed if nx.has_path(flow, n.name, a.name) and nx.has_path(flow, n.name, b.name)]
    assert index.share_computed_ancestor(a, b) == bool(both)


def test_a_size_does_not_make_its_tensor_an_ancestor():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    narrowed = graph.call_function(torch.narrow, (y, 0, 0, graph.call_method("size", (x, 0))))
    total = graph.call_function(torch.add, (x, narrowed))
    graph.output(total)
    index = GraphIndex(graph, {})
    assert not index.is_ancestor(x, narrowed)
    assert index.is_ancestor(x, total)
    assert nx.has_path(to_networkx(graph), "x", narrowed.name)  # the oracle must be asked without sizes
