"""Work on a model aside from the call that it is done in: captures, and rehearsals on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mfx import compat
from mfx.modules.python_state import states_noted_once
from mfx.modules.random_state import undisturbed


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Enclose what mfx does with a model beside the call itself: no observer, cache or generator notices it.

    Everything of that kind in mfx runs in this context: see `compat.aside_from_caller` for what the block is hidden
    from, and `undisturbed` for the random generators that are put back. In it a model's Python state is noted once.
    """
    with compat.patching(), compat.aside_from_caller(), undisturbed(model), states_noted_once():
        yield
