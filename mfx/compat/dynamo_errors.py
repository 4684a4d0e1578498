"""The errors by which TorchDynamo gives up a capture."""

from __future__ import annotations

import traceback

import torch._dynamo
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound

from mfx_passes.errors import MfxError

# The second is raised where a branch of Python code depends on a number that was read from a tensor.
_ERRORS = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound)


def has_given_up(error: Exception) -> bool:
    """True if an error of a capture is Dynamo's: one of its own, or whatever else it has run into.

    It runs nothing of the model's, but what it takes for constants. (A number read from a tensor, in a format string or
    in a function that it does not know, ends in errors of Python.)
    """
    if isinstance(error, _ERRORS):
        return True
    ends = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    return not isinstance(error, MfxError) and not any(name.startswith(("mfx.", "mfx_passes.")) for name in ends)


def is_raised_by_model(error: Exception) -> bool:
    """True if Dynamo has given up because what it looked at raised an error."""
    return "Observed exception" in str(error)
