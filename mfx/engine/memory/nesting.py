"""Decides how steps that hold chains are recomputed, by their costs: a pure function.

Recomputing such a step with its chains, which then rebuild their activations once more, runs what is inside three
times. Two ways run everything at most twice, as a checkpoint does:

* held: what the step saves outside of its chains is kept, and the chains rebuild theirs by themselves: what a
  checkpoint around every innermost block does;
* whole: the step is recomputed once, and all its activations are there until their gradients are: what a checkpoint
  around the step does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mfx.engine.memory.plan import ChainCost, make_plan

Place = tuple[int, int]  # the number of a chain, and of one of its steps


def choose_nesting(costs: Sequence[ChainCost], around: Sequence[Place | None]) -> list[ChainCost]:
    """Return the costs, with the steps that hold chains as ``held`` or as ``whole``.

    A chain that keeps its steps' inputs (γ = 0) holds its steps if a quarter of their work or more is inside of their
    chains: the steps of those are the blocks that one would put a checkpoint around. (In U-Nets it is a half.) A chain
    that is walked back takes the way with fewer bytes.
    The chains inside of a step that is recomputed whole have no costs of their own.

    Args:
        costs: of the chains in the order of their calls; what a step saves is without what its chains save, its work
            is with theirs.
        around: for each chain, the step around it, if it is inside of one.
    """
    inside: dict[Place, list[int]] = {}
    for number, place in enumerate(around):
        if place is not None:
            inside.setdefault(place, []).append(number)
    chains: dict[int, _Nested] = {}
    for number in reversed(range(len(costs))):  # a chain is called before those inside of its steps
        steps = {i: [chains[n] for n in found] for (chain, i), found in inside.items() if chain == number}
        chains[number] = _nested(costs[number], steps)
    decided: list[ChainCost] = []
    for number, place in enumerate(around):
        is_free = place is not None and (not decided[place[0]].steps or place[1] in decided[place[0]].whole)
        decided.append(ChainCost((), None) if is_free else chains[number].cost)
    return decided


@dataclass(frozen=True)
class _Nested:
    """A chain with the chains inside of its steps.

    Attributes:
        cost: of the chain, with the way chosen.
        kept: bytes kept at the least, by the chains inside as well.
        at_once: bytes of the largest recomputation.
        all: bytes of all activations.
        flops: of all branches.
    """

    cost: ChainCost
    kept: float
    at_once: int
    all: int
    flops: int


def _nested(cost: ChainCost, inside: Mapping[int, Sequence[_Nested]]) -> _Nested:
    within = [sum(chain.all for chain in inside.get(i, ())) for i in range(len(cost.steps))]
    steps = tuple(
        replace(step, saved=step.saved + all_, rise=None if all_ else step.rise)
        for step, all_ in zip(cost.steps, within, strict=True)
    )
    holders = frozenset(inside)
    ways = [_with(replace(cost, held=holders), inside)]
    if holders:
        ways.append(_with(replace(cost, steps=steps, whole=holders), inside))
    flops = sum(step.flops for step in steps)
    if cost.states is None:
        work_inside = sum(chain.flops for chains in inside.values() for chain in chains)
        chosen = ways[0] if 4 * work_inside >= sum(steps[i].flops for i in holders) else ways[-1]
    else:
        chosen = min(ways, key=lambda way: way.kept + way.at_once)
    return replace(chosen, all=sum(step.saved + step.reads for step in steps), flops=flops)


def _with(cost: ChainCost, inside: Mapping[int, Sequence[_Nested]]) -> _Nested:
    chains = [chain for i in cost.held for chain in inside[i]]
    kept = make_plan([cost], 0.0).minimum + sum(chain.kept for chain in chains)
    runs = [step.saved + step.reads for i, step in enumerate(cost.steps) if i not in cost.held]
    return _Nested(cost, kept, max([*runs, *(chain.at_once for chain in chains)], default=0), 0, 0)
