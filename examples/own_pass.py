"""Your own pass on top of mfx_passes: what finds the residual branches of a model can be used for other ends.

    python examples/own_pass.py

``mfx_passes.find_chains`` reads the graph of any model and says which nodes are residual adds, in which order. The pass
below puts a module behind every branch, without knowing a name of the model. With a module that measures, it shows how
much each branch adds to the stream, before and after training; with one that drops it at random, it is stochastic depth
(Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016). Half a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from vit_pytorch import ViT

import mfx
from mfx_passes import find_chains
from mfx_passes.ir import Update


class AfterBranch(PassBase):
    """Puts a module behind the branch of every residual step of a ``GraphModule``: x + f(x) becomes x + m(f(x), x).

    Args:
        make: gets a step and a number in [0, 1], 0 for the first and 1 for the last, and returns the module m.
    """

    def __init__(self, make: Callable[[Update, float], nn.Module]) -> None:
        super().__init__()
        self._make = make

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrites a graph module in place."""
        found = find_chains(graph_module.graph, dict(graph_module.named_modules()))
        steps = [update for chain in found.chains for update in chain.updates]
        for number, step in enumerate(steps):
            name = f"after_branch_{number}"
            graph_module.add_submodule(name, self._make(step, number / max(len(steps) - 1, 1)))
            (branch,) = step.add.branch
            with found.graph.inserting_after(branch):
                after = found.graph.call_module(name, (branch, step.term))
            after.meta = dict(branch.meta)
            step.add.node.replace_input_with(branch, after)
        found.graph.lint()
        graph_module.graph = found.graph
        return PassResult(graph_module, bool(steps))


class Measured(nn.Module):
    """Notes how large a branch is, relative to what it is added to."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.share = path, 0.0

    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        """f as it is; both (batch, tokens, width)."""
        self.share = (f.detach().norm() / x.detach().norm()).item()
        return f


class Dropped(nn.Module):
    """Stochastic depth: in training, leaves a branch out for a random part of the batch, and scales the rest up."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.keep = 1 - probability

    def forward(self, f: Tensor, x: Tensor) -> Tensor:
        """f (batch, tokens, width), or 0."""
        if not self.training:
            return f
        return f * (torch.rand(len(f), 1, 1, device=f.device) < self.keep) / self.keep


def with_modules(model: nn.Module, make: Callable[[Update, float], nn.Module]) -> fx.GraphModule:
    """A graph of a model, on the same parameters, with modules behind its branches."""
    return AfterBranch(make)(mfx.trace(model)).graph_module


def shares(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Size of every branch relative to the stream, by module path."""
    measured = with_modules(model.eval(), lambda step, _: Measured(step.path))
    with torch.no_grad():
        measured(images)
    return {module.path: module.share for module in measured.modules() if isinstance(module, Measured)}


def vit(depth: int) -> ViT:
    """A small vision transformer for the digits."""
    torch.manual_seed(0)
    return ViT(image_size=8, patch_size=2, num_classes=10, dim=32, depth=depth, heads=2, mlp_dim=64, channels=1)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, bar: tqdm) -> None:
    """Trains in place."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        index = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        loss = cross_entropy(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        bar.update()


def plot(curves: dict[str, dict[str, float]], path: Path) -> None:
    """Sizes of branches by depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained", dpi=150)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), list(curve.values()), "o-", label=name)
    axes.set_xlabel("residual step (attention, feed-forward, attention, ...)")
    axes.set_title("‖f(x)‖ / ‖x‖ of every branch")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Runs the example; returns the sizes of all branches, by network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("own_pass.png"), help="where to save the plot")
    parser.add_argument("--depth", type=int, default=6, help="layers, of two steps each")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--drop", type=float, default=0.5, help="how often the last branch is left out")
    options = parser.parse_args(argv)

    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(digits)
    plain, dropped = vit(options.depth), vit(options.depth)
    curves = {"before training": shares(plain, images)}
    with tqdm(total=2 * options.steps, unit="step") as bar:
        train(plain.train(), images, labels, options.steps, bar)
        graph = with_modules(dropped.train(), lambda _, place: Dropped(options.drop * place))
        train(graph, images, labels, options.steps, bar)
    curves |= {"trained": shares(plain, images), "trained with stochastic depth": shares(dropped, images)}
    for name, curve in curves.items():
        print(f"{name:30}", " ".join(f"{share:.2f}" for share in curve.values()))
    plot(curves, options.png)
    return curves


if __name__ == "__main__":
    main()
