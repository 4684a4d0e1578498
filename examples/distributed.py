"""Trains a momentumized transformer on several processes, its parameters copied (DDP) or sharded (FSDP2).

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --shard
    torchrun --nproc-per-node 2 examples/distributed.py --blocks --compile --save weights

Nothing about mfx is different here: momentumize, then compile, then wrap. ``fully_shard`` goes on blocks, whose
parameters are gathered once in the forward and once in the backward pass, or on the branches in them. Without torchrun
it runs in one process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import mfx

TOKENS = 16
BATCH = 32  # of all processes together


class Attention(nn.Module):
    """Self-attention with its own normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Two residual branches; each is a module of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Blocks and a linear head."""

    def __init__(self, depth: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to (batch, tokens, 1)."""
        return self.head(self.blocks(x))


def shard(net: Transformer, mesh: DeviceMesh, *, blocks: bool) -> nn.Module:
    """Gather one block's parameters at a time, or one branch's."""
    for block in net.blocks:
        for module in [block] if blocks else [block.attention, block.mlp]:
            fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def compile_branches(net: Transformer, backend: str) -> None:
    """Compile what the steps call; the blocks around them are not called themselves."""
    for block in net.blocks:
        block.attention.compile(backend=backend)
        block.mlp.compile(backend=backend)


def load(net: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Load weights and optimizer that a run on any number of processes has saved."""
    weights, state = get_state_dict(net, optimizer)
    dcp.load({"net": weights, "optimizer": state}, checkpoint_id=directory)
    set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)


def save(net: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Save weights and optimizer, each process its part."""
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"net": weights, "optimizer": state}, checkpoint_id=directory)


def batch(step: int, width: int) -> tuple[Tensor, Tensor]:
    """This process's part of a batch: for every token, how far its first number is from the sequence's mean."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(BATCH, TOKENS, width, generator=torch.Generator().manual_seed(step))
    x = x[rank::size]
    return x, x[..., :1] - x[..., :1].mean(1, keepdim=True)


@contextmanager
def process_group() -> Iterator[None]:
    """The processes that torchrun started, or this one alone."""
    if dist.is_initialized():
        yield
        return
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def plot(losses: Sequence[float], path: Path) -> None:
    """The loss of every step."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(5, 3.5), layout="constrained", dpi=150)).subplots()
    axes.plot(losses)
    axes.set_xlabel("step")
    axes.set_title("loss, the mean over all processes", fontsize=11)
    axes.set_ylim(bottom=0)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Runs the example; returns the loss of every step, the mean over processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", action="store_true", help="fully_shard (FSDP2) instead of DistributedDataParallel")
    parser.add_argument("--blocks", action="store_true", help="fully_shard on whole blocks, not on their branches")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="compile the branches")
    parser.add_argument("--load", type=Path, help="a directory to go on from")
    parser.add_argument("--save", type=Path, help="a new directory for weights and optimizer")
    parser.add_argument("--gamma", type=float, default=0.9, help="the momentum (default 0.9)")
    parser.add_argument("--depth", type=int, default=12, help="blocks, of two residual branches each (default 12)")
    parser.add_argument("--width", type=int, default=64, help="numbers per token (default 64)")
    parser.add_argument("--steps", type=int, default=50, help="training steps (default 50)")
    parser.add_argument("--png", type=Path, default=Path("distributed.png"), help="where to save the plot")
    options = parser.parse_args(argv)

    torch.manual_seed(0)  # the same weights everywhere
    with process_group():
        net = mfx.momentumize(Transformer(options.depth, options.width), gamma=options.gamma)
        parallel: nn.Module
        if options.compile:
            compile_branches(net, options.compile)
        if options.shard or options.blocks:
            parallel = shard(net, init_device_mesh("cpu", (dist.get_world_size(),)), blocks=options.blocks)
        else:
            parallel = DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        if options.load:
            load(parallel, optimizer, options.load)
        losses: list[float] = []
        is_first = dist.get_rank() == 0
        for step in (bar := tqdm(range(options.steps), unit="step", disable=not is_first)):
            x, y = batch(step, options.width)
            loss = mse_loss(parallel(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
            optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / dist.get_world_size())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
        if options.save:
            save(parallel, optimizer, options.save)
        if is_first:
            print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")
            plot(losses, options.png)
    return losses


if __name__ == "__main__":
    main()
