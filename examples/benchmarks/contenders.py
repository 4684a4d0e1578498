"""The ways to train a deep residual network that `memory.py` compares: with torch, with other packages, with mfx."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

import mfx
from examples.benchmarks.blocks import Residual

WIDTH = 64
Forward = Callable[[Tensor], Tensor]


def step(forward: Forward, x: Tensor) -> None:
    """One training step without the optimizer."""
    x.grad = None
    forward(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def checkpointed(model: Residual, size: int) -> Forward:
    """``torch.utils.checkpoint`` around every ``size`` blocks."""
    blocks = list(model.branches)

    def run(x: Tensor, start: int) -> Tensor:
        for branch in blocks[start : start + size]:
            x = x + branch(x)
        return x

    def forward(x: Tensor) -> Tensor:
        for start in range(0, len(blocks), size):
            x = checkpoint(run, x, start, use_reentrant=False)
        return x

    return forward


class TwoStreams(nn.Module):
    """Starts both streams of a reversible network with the same state."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to (batch, 2 * width)."""
        return self.net(torch.cat([x, x], 1))


def _momentumnet(branches: list[nn.Module]) -> Forward:
    from momentumnet import MomentumNet

    return MomentumNet(branches, gamma=0.9, use_backprop=False)


def _memcnn(branches: list[nn.Module]) -> Forward:
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    pairs = zip(branches[::2], branches[1::2], strict=True)
    return TwoStreams(nn.Sequential(*(InvertibleModuleWrapper(AdditiveCoupling(f, g)) for f, g in pairs)))


def _revlib(branches: list[nn.Module]) -> Forward:
    from revlib import ReversibleSequential

    return TwoStreams(ReversibleSequential(*branches))


def _revtorch(branches: list[nn.Module]) -> Forward:
    from revtorch import ReversibleBlock, ReversibleSequence

    pairs = zip(branches[::2], branches[1::2], strict=True)
    return TwoStreams(ReversibleSequence(nn.ModuleList(ReversibleBlock(f, g) for f, g in pairs)))


PEERS: Mapping[str, Callable[[list[nn.Module]], Forward]] = {
    "momentumnet, memory mode": _momentumnet,
    "memcnn": _memcnn,
    "revlib": _revlib,
    "revtorch": _revtorch,
}


def peers(model: Residual, x: Tensor) -> dict[str, Forward]:
    """The packages that are installed and train these blocks; of the others, standard error says why not."""
    made = {name: _working(name, make, model, x) for name, make in PEERS.items()}
    return {name: forward for name, forward in made.items() if forward is not None}


def _working(name: str, make: Callable[[list[nn.Module]], Forward], model: Residual, x: Tensor) -> Forward | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old packages use what torch has deprecated
            forward = make(list(model.branches))
            step(forward, x)
    except Exception as error:  # of any kind: it is not ours
        print(f"left out: {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return forward


def eager(model: Residual, x: Tensor) -> dict[str, Forward]:
    """Everything that is compared without a compiler."""
    root = round(len(model.branches) ** 0.5)
    return {
        "plain": model,
        "checkpoint, every block": checkpointed(model, 1),
        "checkpoint, segments of 4": checkpointed(model, 4),
        f"checkpoint, segments of √n = {root}": checkpointed(model, root),
        **peers(model, x),
        "mfx, gamma=0": mfx.momentumize(model, gamma=0.0),
        "mfx, float": mfx.momentumize(model, gamma=0.9, arithmetic="float"),
        "mfx, exact": mfx.momentumize(model, gamma=0.9),
        **{
            f"mfx, exact, memory_budget={share}": mfx.momentumize(model, gamma=0.9, memory_budget=share)
            for share in (0.25, 0.5, 0.75)
        },
    }


def compiled(model: Residual) -> dict[str, Forward]:
    """torch.compile, keeping all or some activations, and around mfx."""
    rows: dict[str, Forward] = {
        f"torch.compile, budget {share}": torch.compile(model, backend=_keeping(share), fullgraph=True)
        for share in (1.0, 0.5, 0.2, 0.1)
    }
    for arithmetic in ("float", "exact"):
        net = mfx.momentumize(model, gamma=0.9, arithmetic=arithmetic)
        rows[f"torch.compile(mfx), {arithmetic}"] = torch.compile(net, fullgraph=True)
    return rows


def _keeping(share: float) -> Callable[..., Any]:
    """Inductor with a budget; a backend of its own, for Dynamo would take the graph of another budget for this one."""

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with functorch.patch(activation_memory_budget=share):
            return compile_fx(graph, inputs)

    return backend
