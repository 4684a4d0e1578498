"""The sums among rejections that a reader of the model would call residual steps."""

from __future__ import annotations

from torch import nn
from torch.fx import Node

from mfx_passes import Refusal, Rejection


def is_residual_step(rejection: Rejection, module: nn.Module) -> bool:
    """True if a sum that stays as it was is a residual step of the model, and not only looks like one.

    A residual step has weights: between the value that both terms come from and the sum. The x³ of a GELU and sums of
    masks have none. Where both terms are computed, all that they are computed from passes through that one value, as at
    a projection shortcut; an embedding of time that is added to a feature is computed from something else.

    Args:
        rejection: the sum.
        module: the module whose forward the graph is.
    """
    source, has_weights = _common_source(rejection.node, module)
    return has_weights and (rejection.refusal is not Refusal.MERGE or source is not None)


def _common_source(node: Node, module: nn.Module) -> tuple[Node | None, bool]:
    """Return the last computed value that everything passes on its way to a node, or None; and if weights follow.

    Of the values still to be looked at, the last one is looked at first, so that none is looked at twice: when a single
    one is left, it is the source.
    """
    position = {each: number for number, each in enumerate(node.graph.nodes)}
    waiting, has_weights, is_start = {node}, False, True
    while waiting:
        last = max(waiting, key=position.__getitem__)
        if last.op == "placeholder":
            return None, has_weights
        if len(waiting) == 1 and not is_start:
            return last, has_weights
        is_start = False
        waiting.remove(last)
        has_weights = has_weights or _holds_weights(last, module)
        for source in last.all_input_nodes:
            if source.op == "get_attr":
                has_weights = has_weights or isinstance(_at(module, str(source.target)), nn.Parameter)
            else:
                waiting.add(source)
    return None, has_weights


def _holds_weights(node: Node, module: nn.Module) -> bool:
    called = _at(module, str(node.target)) if node.op == "call_module" else None
    return isinstance(called, nn.Module) and next(called.parameters(), None) is not None


def _at(module: nn.Module, path: str) -> object:
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
