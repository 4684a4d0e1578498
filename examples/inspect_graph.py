"""Shows what mfx does to a model's graph: before, after, its chains, what is left alone, and the code of a branch.

Then what reads the states of its chains: a query on the graph as a ``networkx.DiGraph``, which is saved as GraphML, too
(for yEd, Gephi and others).

    python examples/inspect_graph.py                      # a model written by hand, and torchvision's resnet18
    python examples/inspect_graph.py --model vit_b_16     # any other of torchvision's

The latter is drawn, too. Nothing is computed: graphs are traced, and shapes and memory are found on tensors without
values.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
import torch
import torchvision
from torch import Tensor, nn

import mfx

FREES = re.compile(r";  [\w = ]+ = None$")


class Handwritten(nn.Module):
    """No submodule is called a block, the chain is in a loop over two lists, the last sum is not a residual step."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """From states (batch, width) to states of the same shape."""
        x = self.first(x)
        states = [x]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            states.append(states[-1] + torch.tanh(layer(norm(states[-1]))))
        return self.left(states[-1]) + self.right(states[3])


def code(graph: torch.fx.Graph, lines: int) -> str:
    """A graph as Python code, without what only frees memory, cut after so many lines."""
    source = graph.python_code("self").src.strip().splitlines()
    shown = [FREES.sub("", line).rstrip() for line in source[:lines]]
    return "\n".join([*shown, *([f"    ... {len(source) - lines} more lines"] if len(source) > lines else [])])


def other_readers(view: nx.DiGraph, chain: str, step: int) -> list[str]:
    """Names of what reads the state that a step of a chain (not its first) starts from, besides the step itself."""
    state = {"chain": chain, "step": step - 1, "role": "sum"}
    found = [name for name, facts in view.nodes.items() if state.items() <= facts.items()]
    return [reader for _, reader in view.out_edges(found) if view.nodes[reader].get("step") != step]


def readers(view: nx.DiGraph) -> str:
    """The `other_readers` of all chains, a line for each step."""
    steps = sorted({(facts["chain"], facts["step"]) for facts in view.nodes.values() if facts.get("step")})
    return "\n".join(f"{chain}, step {step}: {other_readers(view, chain, step) or 'nothing'}" for chain, step in steps)


def inspect(model: nn.Module, x: Tensor, *, gamma: float, lines: int) -> str:
    """All there is to see of a model."""
    net = mfx.momentumize(model, gamma=gamma)
    explanation = mfx.explain(net, x)
    (after,) = mfx.graphs(net).values()
    sections = [
        ("what was found", str(explanation)),
        ("the graph before", code(mfx.trace(model).graph, lines)),
        ("the graph after: one call per chain", code(after.graph, lines)),
    ]
    sections.append(("what reads the states besides the next step", readers(mfx.to_networkx(net))))
    for chain in explanation.chains[:1]:
        step = chain.steps[0]
        sections.append((f"the branch of the first step of the chain {chain.name}", code(step.branch, lines)))
    rule = "─" * 100
    return "\n\n".join(f"{rule}\n{type(model).__name__}: {title}\n{rule}\n{text}" for title, text in sections)


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Runs the example; returns what it printed, model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision (default resnet18)")
    parser.add_argument("--size", type=int, default=224, help="of the images (default 224)")
    parser.add_argument("--gamma", type=float, default=0.9, help="the momentum (default 0.9)")
    parser.add_argument("--lines", type=int, default=40, help="lines of code to show of each graph (default 40)")
    parser.add_argument("--svg", type=Path, default=Path("inspect_graph.svg"), help="where to save the drawing")
    parser.add_argument("--graphml", type=Path, default=Path("inspect_graph.graphml"), help="where to save the graph")
    options = parser.parse_args(argv)

    with torch.device("meta"):  # shapes are all that is needed
        models = [
            (Handwritten(), torch.zeros(32, 64)),
            (torchvision.models.get_model(options.model), torch.zeros(8, 3, options.size, options.size)),
        ]
    net = mfx.momentumize(models[1][0], gamma=options.gamma)
    mfx.draw(net, options.svg)
    nx.write_graphml(mfx.to_networkx(net), options.graphml)
    shown = [inspect(model, x, gamma=options.gamma, lines=options.lines) for model, x in models]
    print("\n\n".join(shown))
    return shown


if __name__ == "__main__":
    main()
