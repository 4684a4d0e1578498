"""Momentumized stages under torch's pipeline schedules: gradients of kept activations, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

import mfx
from tests.distributed.nets import HOW
from tests.distributed.world import SIZE
from tests.mfx.models import WIDTH, Stack

MICRO = 4  # micro-batches
DEPTH = 5  # blocks a stage, of two steps each: a chain of ten is walked back

SCHEDULES = {"GPipe": 1, "1F1B": 1, "InterleavedZeroBubble": 2}  # stages a process


class Stage(nn.Module):
    """The blocks of a stack: the chain is cut where the stage ends."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = Stack(DEPTH).blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


def stage_of(net: nn.Module, number: int, count: int) -> PipelineStage:
    """Return a stage that knows what it is given: without, torch would run it on uninitialised values first."""
    given = torch.zeros(2, WIDTH, requires_grad=number > 0)
    returned = torch.zeros(2, WIDTH, requires_grad=True)
    return PipelineStage(net, number, count, torch.device("cpu"), input_args=(given,), output_args=(returned,))


def gradients(schedule: str, how, budget: float) -> dict[str, Tensor]:
    """Return this process's gradients after one step of a schedule."""
    arithmetic, gamma = how
    rank, each = dist.get_rank(), SCHEDULES[schedule]
    x = torch.randn(MICRO * 2, WIDTH, generator=torch.Generator().manual_seed(1))
    nets = [
        mfx.momentumize(Stage(rank + SIZE * i), arithmetic=arithmetic, gamma=gamma, memory_budget=budget)
        for i in range(each)
    ]
    stages = [stage_of(net, rank + SIZE * i, SIZE * each) for i, net in enumerate(nets)]
    cls = getattr(pipelining, f"Schedule{schedule}")
    run = cls(stages if each > 1 else stages[0], MICRO, loss_fn=loss_of, scale_grads=False)
    last = rank == SIZE - 1
    run.step(*((x,) if rank == 0 else ()), **({"target": x.tanh()} if last else {}))
    return {f"{i}.{name}": p.grad for i, net in enumerate(nets) for name, p in net.named_parameters()}


def compare(schedule, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about schedules; and of mfx, about many walks of one graph
        rebuilt, kept = (gradients(schedule, how, budget) for budget in (0.0, 1.0))
    assert all(grad is not None and grad.any() for grad in kept.values())
    return all(torch.equal(rebuilt[name], grad) for name, grad in kept.items())


@pytest.mark.parametrize("how", [how for how in HOW if how[0] == "exact"], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_those_of_kept_activations(world, schedule, how):
    assert all(world.run(compare, schedule, how))


def explained(number, how):
    """Return the borders of stage ``number`` of three that an explanation tells of."""
    arithmetic, gamma = how
    net = mfx.momentumize(Stage(number), arithmetic=arithmetic, gamma=gamma)
    stage = stage_of(net, number, 3)
    found = mfx.explain(stage, torch.zeros(2, WIDTH))
    assert mfx.explain(net, torch.zeros(2, WIDTH)).borders == ()  # which is not known to be a stage
    assert found.to_dict()["borders"] == list(found.borders)
    assert set(found.borders) <= set(found.advice)
    return found.borders, str(found), len(found.chains[0].steps)


@pytest.mark.parametrize(("number", "others"), [(0, "stage 1"), (1, "stages 0 and 2"), (2, "stage 1")])
def test_an_explanation_says_where_a_stage_cuts_a_chain(world, number, others):
    (borders, text, steps), _ = world.run(explained, number, HOW[0])
    (line,) = borders
    assert line.startswith(f"blocks: cut by the border of stage {number} of 3, numbered from 0, to {others}: ")
    assert "momentum starts anew at the border" in " ".join(text.split())
    assert steps == 2 * DEPTH


def test_at_gamma_zero_a_border_changes_nothing(world):
    (borders, _, _), _ = world.run(explained, 1, ("exact", 0.0))
    assert borders == ()
