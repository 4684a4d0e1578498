"""Tell whether a model can have chains in any call."""

from __future__ import annotations

from torch import nn

from mfx.capture.captured import signature_of
from mfx.modules.state_lock import StateLock
from mfx.modules.tree_copy import tree_copy
from mfx.net.graph_table import GraphTable
from mfx.options.options import Options
from mfx_passes import MfxError

_FIXED = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")


def never_has_chains(net: nn.Module, options: Options) -> bool:
    """True if a model has no chain in training nor in evaluation, and no argument that might bring one.

    Args:
        net: the model; it is left as it is.
        options: how it would be rewritten.
    """
    parameters = signature_of(net).parameters.values()
    if any(p.default is not p.empty or p.kind.name not in _FIXED for p in parameters):
        return False
    return not any(_has_chains(net, options, training) for training in (True, False))


def _has_chains(net: nn.Module, options: Options, training: bool) -> bool:
    model = tree_copy(net)
    for module in model.modules():
        module.training = training
    try:
        return bool(GraphTable(model, options, lambda message: None, StateLock()).graph_for_defaults().calls)
    except MfxError:
        return True  # a call may show one, or the error
