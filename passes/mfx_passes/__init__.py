"""Graph passes of mfx: find chains of residual adds in a ``torch.fx`` graph and put one call in the place of each.

Pure graph work: nothing here runs a model or knows about autograd. The road, one file each::

    vocabulary, sums   what single nodes do; one spelling for a residual sum
    normalize          in-place operations untangled
    mutations          what in-place operations change
    relayout           one layout for all states of a chain
    find, steps        residual adds, strung together, with the nodes each step owns
    check, rows, chains  side conditions; chains cut, nested, named and selected
    fold, sizes        nodes become module calls again; sizes are read off a chain's start
    outline, rewrite   steps cut out as graphs; one momentum call per chain
"""

from mfx_passes.analysis.networkx_view import to_networkx
from mfx_passes.errors import MfxError
from mfx_passes.find.chains import find_chains
from mfx_passes.ir import (
    Chain,
    ChainGraphs,
    Findings,
    ModuleCall,
    Refusal,
    Rejection,
    ResidualAdd,
    Selection,
    Step,
    StepGraphs,
)
from mfx_passes.momentum_pass import MomentumPass, Rewritten, rewrite_graph

__all__ = [
    "Chain",
    "ChainGraphs",
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
    "find_chains",
    "rewrite_graph",
    "to_networkx",
]
