"""A `mfx.MomentumNet` inside of what torch.compile compiles: it runs as it does without, between graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mfx.momentumnet import MomentumNet

__all__ = ["run_outside"]


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="an mfx.MomentumNet runs its functions a second time in the backward pass, which torch.compile cannot take "
    "into its graph; compile the functions, or leave fullgraph False"
)
def run_outside(net: MomentumNet, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a net outside of the graph that is being compiled."""
    return net.run(x, args, kwargs)
