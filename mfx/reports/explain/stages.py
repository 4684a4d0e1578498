"""Chains that a pipeline's stage cuts."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from mfx.compat.pipelining import Stage
from mfx_passes import Findings


def borders(stage: Stage, findings: Findings, without_momentum: Collection[str]) -> tuple[str, ...]:
    """Return the chains that a stage cuts, with what that costs, one line each.

    Only the stage is known: a chain that starts at its input, or ends in its output, goes on in the stage before or
    behind if that goes on with residual steps.

    Args:
        stage: the stage.
        findings: those of its graph.
        without_momentum: names of the chains at γ = 0, for which a border changes nothing.
    """
    lines = []
    for chain in findings.chains:
        if chain.name in without_momentum:
            continue
        before = stage.number - 1 if stage.number and any(start.op == "placeholder" for start in chain.starts) else None
        behind = stage.number + 1 if stage.number + 1 < stage.count and any(map(_leaves, chain.ends)) else None
        if others := [str(number) for number in (before, behind) if number is not None]:
            where = f"stage{'s' if len(others) > 1 else ''} {' and '.join(others)}"
            lines.append(
                f"{chain.name or 'the chain'}: cut by the border of stage {stage.number} of {stage.count}, numbered "
                f"from 0, to {where}: if residual steps go on there, momentum starts anew at the border, and each part "
                "is as long as its own steps; gamma=0 is the whole model's function"
            )
    return tuple(lines)


def _leaves(end: Node) -> bool:
    return any(user.op == "output" for user in end.users)
