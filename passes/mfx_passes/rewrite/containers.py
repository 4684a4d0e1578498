"""Modules whose calls are runs of whole steps.

A transformer block is one: attention and MLP are two steps of a chain, and the block's own ``forward`` does not run.
What hangs on its call (FSDP2 gathers parameters there) has to know where the run begins and ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch.fx import Node

from mfx_passes.find.nesting import Nesting
from mfx_passes.ir import Chain, Container, ModuleCall, Step


def containers_of(calls: Sequence[ModuleCall], nesting: Nesting) -> dict[ModuleCall, tuple[Chain, Container]]:
    """Return the calls that consist of whole steps of a chain, with the chain and the run.

    Nothing else in such a call reads a parameter.

    Args:
        calls: the module calls the tracer walked through.
        nesting: the chains, none of them rewritten, and no call folded.
    """
    numbers = {step: (chain, number) for chain in nesting.chains for number, step in enumerate(chain.steps)}
    found = {}
    for call in calls:
        run = _steps_of(call, nesting)
        chains = {numbers[step][0] for step in run}
        if call.target and len(chains) == 1 and _holds_nothing_else(call, run):
            places = sorted(numbers[step][1] for step in run)
            found[call] = chains.pop(), Container(call.target, places[0], places[-1] + 1)
    return found


def note_containers(found: dict[ModuleCall, tuple[Chain, Container]], flat: Sequence[ModuleCall]) -> None:
    """Note in the chains the containers among calls that were not folded, those around others first.

    A module of which another call was not folded either, and is no run of steps, is not among them.
    """
    others = {call.target for call in flat if call not in found}
    by_chain: dict[Chain, list[Container]] = defaultdict(list)
    for chain, container in (found[call] for call in flat if call in found):
        if container.path not in others:
            by_chain[chain].append(container)
    for chain, containers in by_chain.items():
        chain.containers = tuple(sorted(containers, key=lambda container: (container.first, -container.stop)))


def _steps_of(call: ModuleCall, nesting: Nesting) -> set[Step]:
    """Return the outermost steps that lie in a call as a whole."""
    innermost = {step for node in call.nodes if (step := nesting.innermost(node)) is not None}
    around = ([step, *nesting.around(step)] for step in innermost)
    whole = ([step for step in steps if step.nodes <= call.nodes] for steps in around)
    return {steps[-1] for steps in whole if steps}


def _holds_nothing_else(call: ModuleCall, steps: set[Step]) -> bool:
    rest = call.nodes.difference(*(step.nodes for step in steps))
    return not any(map(_reads_parameters, rest))


def _reads_parameters(node: Node) -> bool:
    return node.op == "call_module" or (node.op != "get_attr" and any(n.op == "get_attr" for n in node.all_input_nodes))
