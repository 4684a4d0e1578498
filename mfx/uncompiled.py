"""A net inside of what torch.compile compiles: it runs as it does without, between the graphs around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mfx.net import RewrittenForward

__all__ = ["run_outside"]


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a net made by mfx.momentumize has graphs of its own, which torch.compile cannot take into its graph; "
    'compile the model itself by torch.compile(model, backend="mfx")'
)
def run_outside(forward: RewrittenForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a net outside of the graph that is being compiled."""
    return forward.run(*args, **kwargs)
