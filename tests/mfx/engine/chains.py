"""Small chains to test with, and the recurrence they must follow, written with ordinary autograd."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfx.engine import (
    ARITHMETICS,
    BLOCK_KERNELS,
    ChainPlan,
    ChainSettings,
    Kernels,
    StepFunction,
    run_chain,
)
from mfx.modules.state_lock import StateLock
from mfx.options.gamma import Gamma

WIDTH = 6


class Output(NamedTuple):
    """The output of a chain of one stream."""

    x: Tensor
    taps: tuple[Tensor, ...]
    sides: tuple[tuple[Any, ...], ...]


class Root(nn.Module):
    """Holds the blocks of a chain, and counts how often each has run."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.runs = [0] * len(blocks)


def block(width: int = WIDTH, *extra: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), *extra, nn.Linear(2 * width, width)
    )


def make_root(depth: int, build: Callable[[], nn.Module] = block, seed: int = 0) -> Root:
    torch.manual_seed(seed)
    return Root([build() for _ in range(depth)])


def make_steps(
    root: Root, kind: str = "residual", call: Callable[..., Any] | None = None, captures: Sequence[int] = ()
):
    """One step per block; ``call(block, x, *captures)`` gives the block's value, or a tuple with side outputs."""
    apply = call or (lambda f, x, *c: f(x))

    def step(i: int) -> StepFunction:
        def branch(r: Root, x: Tensor, *c: Any) -> tuple[Any, ...]:
            r.runs[i] += 1
            out = apply(r.blocks[i], x, *c)
            return out if isinstance(out, tuple) else (out,)

        def original(r: Root, x: Tensor, *c: Any) -> tuple[Any, ...]:
            y, *sides = branch(r, x, *c)
            return (y if kind == "map" else x + y, *sides)

        return StepFunction(f"blocks.{i}", (kind,), branch, original, tuple(captures), (f"blocks.{i}",))

    return [step(i) for i in range(len(root.blocks))]


def run(
    root: Any,
    steps: Sequence[StepFunction],
    x: Tensor,
    captures: Sequence[Any] = (),
    *,
    gamma: float | Gamma = 0.9,
    arithmetic: str = "exact",
    memory_budget: float | ChainPlan = 0.0,
    velocity: Tensor | str | None = None,
    verify: str = "raise",
    kernels: Kernels = BLOCK_KERNELS,
    taps: Sequence[int] = (),
    lock: StateLock | None = None,
    **call: Any,
) -> Output:
    """``run_chain`` on one stream with a float γ, and a verification that raises; the budget is 0.0, 1.0 or a plan."""
    plan = memory_budget if isinstance(memory_budget, ChainPlan) else None
    settings = ChainSettings(
        gamma if isinstance(gamma, Gamma) else Gamma.of(gamma),
        ARITHMETICS[arithmetic],
        velocity=velocity if isinstance(velocity, str) else "zero",
        verify=verify,
        plan=ChainPlan.keep_all(len(steps)) if memory_budget == 1.0 else plan,
        kernels=kernels,
        lock=StateLock() if lock is None else lock,
    )
    v0 = [velocity] if isinstance(velocity, Tensor) else None
    pairs = [(t, 0) for t in taps]
    found = run_chain("blocks", steps, [x], captures, root, settings, v0=v0, taps=pairs, **call)
    return Output(*found.xs, found.taps, found.sides)


def recurrence(
    root: Root,
    steps: Sequence[StepFunction],
    x: Tensor,
    captures: Sequence[Any] = (),
    *,
    gamma: float = 0.9,
    velocity: Any = None,
    taps: Sequence[int] = (),
) -> Output:
    """The oracle: v ← γ·v + (1−γ)·f(x), x ← x + v, in whatever dtype it is given."""
    v = velocity if isinstance(velocity, Tensor) else torch.zeros_like(x)
    xs, sides = [x], []
    for t, step in enumerate(steps):
        y, *side = step.branch(root, x, *(captures[i] for i in step.captures))
        f = y - x if step.kinds == ("map",) else y
        v = f if t == 0 and velocity == "residual" else gamma * v + (1 - gamma) * f
        x = x + v
        xs.append(x)
        sides.append(tuple(side))
    return Output(x, tuple(xs[t] for t in taps), tuple(sides))


def gradients(loss: Tensor, root: nn.Module, *inputs: Tensor, **kw: Any) -> list[Tensor]:
    """Of ``loss``, with respect to ``inputs`` and then the parameters that require them; zero where unused."""
    wanted = [*inputs, *(p for p in root.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True, **kw))


def weights_like(x: Tensor) -> Tensor:
    """Something to make a loss that treats no two elements alike."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error among corresponding tensors, each in its maximum norm."""
    assert len(found) == len(expected)
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        scale = b.abs().max().item()
        worst = max(worst, (a.double() - b.double()).abs().max().item() / (scale or 1.0))
    return worst
