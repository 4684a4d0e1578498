"""Work on a model aside from the call that it is done in: captures, and rehearsals on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mfx import compat
from mfx.modules.initialized import initialization_draws
from mfx.modules.python_state import states_noted_once
from mfx.modules.random_state import undisturbed


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Enclose what mfx does with a model beside the call itself: no observer, cache or generator notices it.

    Everything of that kind in mfx runs in this context: see `compat.aside_from_caller` for what the block is hidden
    from, and `undisturbed` for the random generators that are put back, but for draws of parameters that the block
    initializes. In it a model's Python state is noted once.
    """
    generators = initialization_draws(model), undisturbed(model)
    with compat.patching(), compat.aside_from_caller(), generators[0], generators[1], states_noted_once():
        yield
