"""Two things that a momentum net can do and a residual network cannot: cross trajectories, separate nested rings.

    python examples/toy_dynamics.py

After Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks" (ICML 2021), section 4. Both networks have the
same functions, of Lipschitz constant below 1. Then a residual layer x + f(x) is invertible: on a line it keeps the
order of points, so no network of such layers comes closer to x ↦ −x³ than a constant does; in the plane it keeps a ring
that lies inside of another one inside. A momentum net has a velocity beside the state, and its points may pass each
other. Two minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from tqdm import tqdm

import mfx

GAMMA = 0.9
NETS = {"ResNet": 0.0, "momentum net": GAMMA}
LIPSCHITZ = 0.95


@dataclass(frozen=True)
class Result:
    """One trained network.

    Attributes:
        states: after each layer, (layers + 1, points, width).
        score: mean squared error on the line, accuracy in the plane.
    """

    states: Tensor
    score: float


class Bounded(nn.Module):
    """A function of two layers whose Lipschitz constant is at most `LIPSCHITZ`."""

    def __init__(self, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """f(x), of the shape of x (points, width)."""
        norms = [torch.linalg.matrix_norm(layer.weight, ord=2) for layer in (self.inner, self.outer)]
        scale = LIPSCHITZ / (norms[0] * norms[1]).clamp(min=LIPSCHITZ)
        return scale * self.outer(torch.tanh(self.inner(x)))


def network(gamma: float, width: int, layers: int) -> mfx.MomentumNet:
    """At γ = 0 this is the residual network x ← x + f(x)."""
    return mfx.MomentumNet([Bounded(width) for _ in range(layers)], gamma, arithmetic="float")


@torch.no_grad()
def states(net: mfx.MomentumNet, x: Tensor) -> Tensor:
    """The state after every layer, (layers + 1, points, width)."""
    functions = net.functions
    parts = [mfx.MomentumNet(functions[:t], net.gamma, arithmetic="float") for t in range(1, len(functions) + 1)]
    return torch.stack([x, *(part(x) for part in parts)])


def train(modules: nn.Module, loss: Callable[[], Tensor], steps: int, bar: tqdm) -> None:
    """Minimises a loss."""
    optimizer = torch.optim.Adam(modules.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.3f}")
        bar.update()


def cross(gamma: float, layers: int, steps: int, bar: tqdm) -> Result:
    """Learns x ↦ −x³ on [−1, 1]."""
    torch.manual_seed(0)
    net = network(gamma, 1, layers)
    x = torch.linspace(-1, 1, 101).unsqueeze(1)
    train(net, lambda: mse_loss(net(x), -(x**3)), steps, bar)
    return Result(states(net, x), mse_loss(net(x), -(x**3)).item())


def rings(points: int) -> tuple[Tensor, Tensor]:
    """Two noisy rings of radius 0.5 and 1, and which one each point is on."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(points) % 2
    angles = 2 * torch.pi * torch.rand(points, generator=generator)
    radii = 0.5 + 0.5 * labels + 0.05 * torch.randn(points, generator=generator)
    return torch.stack((angles.cos(), angles.sin()), 1) * radii.unsqueeze(1), labels


def separate(gamma: float, layers: int, steps: int, bar: tqdm) -> Result:
    """Learns to move two rings apart, to where a line lies between them."""
    torch.manual_seed(0)
    x, labels = rings(400)
    net, line = network(gamma, 2, layers), nn.Linear(2, 1)

    def logits() -> Tensor:
        return line(net(x)).squeeze(1)

    train(nn.ModuleList([net, line]), lambda: binary_cross_entropy_with_logits(logits(), labels.float()), steps, bar)
    return Result(states(net, x), ((logits() > 0) == labels).float().mean().item())


def plot(lines: Sequence[Result], planes: Sequence[Result], path: Path) -> None:
    """Trajectories on the line above, rings before and after below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained", dpi=150)
    above, below = figure.subplots(2, 2)
    for axes, name, result in zip(above, NETS, lines, strict=True):
        axes.plot(result.states[:, ::10, 0], linewidth=1.5)
        axes.set_title(f"{name}: x ↦ −x³, error {result.score:.3f}")
        axes.set_xlabel("layer")
    _, labels = rings(planes[0].states.shape[1])
    for axes, name, result in zip(below, NETS, planes, strict=True):
        axes.scatter(*result.states[-1].T, c=labels, s=6, cmap="coolwarm")
        axes.set_title(f"{name}: rings, {result.score:.1%} right")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Result]]:
    """Runs the example; returns the results by task and network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("toy_dynamics.png"), help="where to save the plot")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each network")
    options = parser.parse_args(argv)

    tasks = {"line": cross, "rings": separate}
    results: dict[str, dict[str, Result]] = {task: {} for task in tasks}
    with tqdm(total=len(tasks) * len(NETS) * options.steps, unit="step") as bar:
        for task, learn in tasks.items():
            for name, gamma in NETS.items():
                bar.set_description(f"{task}, {name}")
                results[task][name] = learn(gamma, options.layers, options.steps, bar)
    print("| network | x ↦ −x³: mean squared error | nested rings: accuracy |", "|---|--:|--:|", sep="\n")
    for name in NETS:
        print(f"| {name} | {results['line'][name].score:.4f} | {results['rings'][name].score:.1%} |")
    plot([*results["line"].values()], [*results["rings"].values()], options.png)
    return results


if __name__ == "__main__":
    main()
