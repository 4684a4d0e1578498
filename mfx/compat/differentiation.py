"""Backward passes and torch.func transforms that a model makes while it runs, observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from mfx.compat.patching import patched

_PLACES = (  # torch 2.11 to 2.15
    (torch.autograd, "backward", "makes a backward pass, which adds to gradients"),
    (eager_transforms, "_grad_increment_nesting", "differentiates by torch.func"),
    (eager_transforms, "_jvp_increment_nesting", "differentiates by torch.func"),
    (forward_ad, "enter_dual_level", "differentiates in forward mode"),
)


@contextmanager
def differentiation_observed(seen: Callable[[str], object]) -> Iterator[None]:
    """Within this context, call a function before this thread differentiates, but for `torch.autograd.grad`.

    Args:
        seen: called with a verb and its object: "makes a backward pass".
    """

    def observed(function: Callable[..., Any], what: str, *args: Any, **kwargs: Any) -> Any:
        seen(what)
        return function(*args, **kwargs)

    with ExitStack() as stack:
        for owner, name, what in _PLACES:
            stack.enter_context(patched(owner, name, partial(observed, getattr(owner, name), what)))
        yield
