"""The data that the passes hand to each other: residual adds, steps and chains of them, findings and rejections.

The ground floor: it imports nothing of `mfx_passes` but `paths`.
"""

from mfx_passes.ir.findings import Cut, Facts, Findings, Grounds, Rejection, Selection
from mfx_passes.ir.nodes import (
    block_of,
    enclosing_path,
    is_momentum_call,
    momentum_chain,
    source_line,
    tag_block,
    tag_momentum_call,
)
from mfx_passes.ir.refusals import Refusal
from mfx_passes.ir.steps import (
    Chain,
    ChainGraphs,
    Container,
    Kind,
    ModuleCall,
    ResidualAdd,
    Step,
    StepGraphs,
    Update,
    outside,
)

__all__ = [
    "Chain",
    "ChainGraphs",
    "Container",
    "Cut",
    "Facts",
    "Findings",
    "Grounds",
    "Kind",
    "ModuleCall",
    "Refusal",
    "Rejection",
    "ResidualAdd",
    "Selection",
    "Step",
    "StepGraphs",
    "Update",
    "block_of",
    "enclosing_path",
    "is_momentum_call",
    "momentum_chain",
    "outside",
    "source_line",
    "tag_block",
    "tag_momentum_call",
]
