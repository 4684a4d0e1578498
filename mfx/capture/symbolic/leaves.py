"""The modules that the traces of one capture call as a whole."""

from __future__ import annotations

from torch import nn

from mfx.capture.captured import CaptureError
from mfx.capture.symbolic.leaf_modules import timm_modules


class Leaves:
    """The modules that cannot be walked through in the traces of one capture, each with the reason.

    What a trace finds out too late (a module that was walked through, and should not have been) is added here all the
    same: `grew` tells that the model has to be traced again.

    Args:
        allowed: False if no module is to become a leaf, but for layers that timm declares to be untraceable: nothing
            is known about what the others return. Where it declares a block, sizes may tell its way, and show its sums.

    Attributes:
        reasons: why a trace cannot follow each of them, in plain English: "it sets an attribute of its parent".
        grew: True if modules were added in this trace.
    """

    def __init__(self, *, allowed: bool) -> None:
        self.reasons: dict[nn.Module, str] = {}
        self.grew = False
        self._allowed = allowed
        self._declared = timm_modules()

    def __contains__(self, module: object) -> bool:
        return module in self.reasons

    def may_take(self, module: nn.Module) -> bool:
        """True if this module may become a leaf."""
        return self._allowed or (type(module) in self._declared and not _may_hold_steps(module))

    def add(self, module: nn.Module, reason: str) -> None:
        """Have a module called as a whole, in the rest of this trace and in those that follow.

        Args:
            module: a submodule of the model, not the model itself.
            reason: why a trace cannot follow it; `mfx.explain` shows it behind a colon.

        Raises:
            CaptureError: modules may not become leaves here.
        """
        if not self.may_take(module):
            raise CaptureError(f"{type(module).__name__} cannot be traced symbolically: {reason}.")
        self.reasons[module] = reason
        self.grew = self.grew or type(module) not in self._declared  # those leave nothing behind where they fail


def _may_hold_steps(module: nn.Module) -> bool:
    """True if a module is more than a layer: it is made of modules that are made of modules."""
    return any(any(child.children()) for child in module.children())
