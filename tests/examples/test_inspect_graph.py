import networkx as nx

from examples import inspect_graph


def test_it_shows_a_graph_before_and_after(tmp_path, capsys):
    svg, graphml = tmp_path / "a.svg", tmp_path / "a.graphml"
    by_hand, resnet = inspect_graph.main(
        ["--size", "32", "--lines", "12", "--svg", str(svg), "--graphml", str(graphml)]
    )
    assert "layer1" in svg.read_text(encoding="utf-8")
    assert "momentum_layer1" in nx.read_graphml(graphml)
    assert capsys.readouterr().out == f"{by_hand}\n\n{resnet}\n"
    titles = [line for line in by_hand.splitlines() if line.startswith("Handwritten: ")]
    assert titles[1].startswith("Handwritten: 4 of 5 residual steps in 1 chain: ")
    assert [titles[0], *titles[2:]] == [
        "Handwritten: what was found",
        "Handwritten: the graph before",
        "Handwritten: the graph after: one call per chain",
        "Handwritten: what reads the states besides the next step",
        "Handwritten: the branch of the first step of the chain root",
    ]
    before, after, branch = by_hand.split("def forward(self, x):")[1:]
    assert "add = first + tanh" in before
    assert "self.momentum_root((first,)" in after
    assert "add = first" not in after
    assert "return (tanh,)" in branch
    assert "layer1_0_bn2 += maxpool;  iadd = layer1_0_bn2" in resnet
    assert "more lines" in resnet
    assert all(len(line) <= 100 for line in by_hand.split("def forward")[0].splitlines())
