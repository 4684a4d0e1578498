"""Graph passes of mfx: find chains of residual adds in a ``torch.fx`` graph and put one call in the place of each.

Pure graph work: nothing here runs a model or depends on autograd, and nothing of `mfx` is imported. The folders, in the
order in which a graph passes them::

    ir            the data that the passes hand to each other; paths and errors beside it
    ops           facts about single nodes: vocabulary, sums, markers of named steps
    analysis      facts about graphs: ancestry, in-place changes, sizes
    named_steps   module calls marked as steps, for models whose user names the steps
    find          chains of residual steps, and refusals of other residual adds; changes no graph
    rewrite       nodes folded to module calls again, steps cut out, one momentum call per chain
    momentum_pass all of them, one after the other
"""

from mfx_passes.analysis.networkx_view import to_networkx
from mfx_passes.errors import MfxError
from mfx_passes.find.chains import find_chains
from mfx_passes.ir import (
    Chain,
    ChainGraphs,
    Cut,
    Findings,
    ModuleCall,
    Refusal,
    Rejection,
    ResidualAdd,
    Selection,
    Step,
    StepGraphs,
    Update,
)
from mfx_passes.momentum_pass import MomentumPass, Rewritten, rewrite_graph

__all__ = [
    "Chain",
    "ChainGraphs",
    "Cut",
    "Findings",
    "MfxError",
    "ModuleCall",
    "MomentumPass",
    "Refusal",
    "Rejection",
    "ResidualAdd",
    "Rewritten",
    "Selection",
    "Step",
    "StepGraphs",
    "Update",
    "find_chains",
    "rewrite_graph",
    "to_networkx",
]
