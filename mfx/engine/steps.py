"""What a chain is made of and what running it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepFunction:
    """One step of a chain.

    Attributes:
        path: the step's module path in the user's model, for messages.
        kind: "residual" if the branch gives f(x); "map" if it gives h(x), where f = h(x) − x is formed in the chain's
            arithmetic.
        branch: ``branch(root, x, *captures)`` gives ``(y, *side_outputs)``.
        original: ``original(root, x, *captures)`` gives ``(x_next, *side_outputs)``: the step before it was rewritten.
        captures: which of the chain's captures the step reads; numbers past them are side outputs of earlier steps,
            counted from the first step on, which must be no tensors.
        targets: dotted paths of the modules and tensors that it reads through the root.
    """

    path: str
    kind: str
    branch: Callable[..., tuple[Any, ...]]
    original: Callable[..., tuple[Any, ...]]
    captures: tuple[int, ...]
    targets: tuple[str, ...]


@dataclass
class ChainOutput:
    """``x`` after the last step, ``taps``: x after the steps asked for, ``sides``: each step's side outputs."""

    x: Tensor
    taps: tuple[Tensor, ...]
    sides: tuple[tuple[Any, ...], ...]


ChainCache = dict[Any, Any]
