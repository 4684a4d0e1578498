import networkx as nx
import pytest
import torch
from torch import nn

import mfx
from mfx.compiler.backend import momentum

D = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def called(net, *modes):
    for training in modes:
        net.train(training)(torch.ones(2, D))
    return net


def test_a_momentumized_net_with_its_steps():
    net = called(mfx.momentumize(Net()), True)
    view = mfx.to_networkx(net)
    (graph,) = mfx.graphs(net).values()
    assert {node.name for node in graph.graph.nodes} < set(view)
    assert set(nx.get_node_attributes(view, "graph").values()) == {"train"}
    assert nx.is_path(view, ["x", "momentum_layers.0", "momentum_layers.1", "momentum_layers.2", "momentum_layers"])
    assert nx.ancestors(view, "head") >= {"x", "momentum_layers.2.layers_2"}
    assert view.nodes["momentum_layers"] == {
        "op": "call_module",
        "target": "momentum_layers",
        "module": "momentum_layers",
        "graph": "train",
        "chain": "layers",
        "role": "momentum call",
        "shape": f"(2, {D})",
        "dtype": "float32",
    }


def test_several_graphs_stand_side_by_side():
    net = called(mfx.momentumize(Net()), True, False)
    view = mfx.to_networkx(net)
    assert {name.partition(": ")[0] for name in view} == {"train", "eval"} == set(mfx.graphs(net))
    assert nx.number_weakly_connected_components(view) == 2
    assert "momentum_layers" in mfx.to_networkx(mfx.graphs(net)["eval"])


def test_graphml_takes_it(tmp_path):
    view = mfx.to_networkx(called(mfx.momentumize(Net()), True, False))
    nx.write_graphml(view, tmp_path / "view.graphml")
    read = nx.read_graphml(tmp_path / "view.graphml")
    assert (read.nodes, read.edges) == (view.nodes, view.edges)


def test_a_compiled_model():
    net = torch.compile(Net(), backend=momentum, options={"inner": "eager"})
    called(net, True)
    assert "momentum call" in nx.get_node_attributes(mfx.to_networkx(net), "role").values()


@pytest.mark.parametrize("net", [Net(), "a path"])
def test_other_things_have_no_graphs(net):
    with pytest.raises(mfx.MfxError, match="momentumize"):
        mfx.to_networkx(net)
