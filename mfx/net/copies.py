"""Copies of a net that were made by copying ``__dict__``, each with the forward that the net has.

An attribute of an instance does not know which instance it was looked up on, and a net's class is its model's, so
nothing but ``__dict__`` can hold its forward. What copies ``__dict__`` (`copy.copy`, ``clone.__dict__.update(…)``,
`torch.nn.DataParallel`, libraries for meta-learning) copies a reference to the very forward that runs the net. With it
comes the `Mark`, to which nothing but the net's ``__dict__`` and its forward refers. One reference more says that there
is a copy. Then `torch.nn.Module`, which calls the forward, is asked for the module that it was called on; a copy is
given a forward of its own, as `copy.deepcopy` would make it, on the modules that it has by now.

A module with the forward but without the mark was given the net's method on purpose, and runs the net, as with a
model's method.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

from mfx.modules.overlay import MARK, Mark, Overlay, added_to
from mfx_passes import MfxError

O = TypeVar("O", bound=Overlay)  # noqa: E741


class _Example(Overlay):
    def __init__(self) -> None:
        self.mark = Mark()


def is_shared(overlay: Overlay) -> bool:
    """True if there may be a copy of the module that still has its overlay."""
    return sys.getrefcount(overlay.mark) > _IN_ONE_MODULE


_EXAMPLE = _Example()
_IN_ONE_MODULE = sys.getrefcount(_EXAMPLE.mark) + 1  # the module's ``__dict__``


def called(overlay: O, caller: FrameType) -> O:
    """Return the overlay of the module that was called, a new one for a copy.

    Args:
        overlay: what was called.
        caller: the frame that called it.

    Raises:
        MfxError: there is a copy, and ``forward`` was called without the module.
    """
    if caller.f_globals is vars(torch_module):
        return own_overlay(caller.f_locals["self"], overlay)
    if copies := list(_copies(overlay)):
        for module in copies:
            own_overlay(module, overlay)
        raise MfxError(
            f"the forward of a {type(overlay.net).__name__} was called by itself, and there is a copy of this net that "
            "had never been called (made by copy.copy, or from its __dict__), so it is not known which of the two is "
            "meant. Call the module instead, net(x), or call it again: from now on the copy has a forward of its own."
        )
    return overlay


def own_overlay(module: nn.Module, overlay: O) -> O:
    """Return the overlay of a module that has this one in its ``__dict__``; a new one if the module is a copy.

    The modules inside of a copy are given theirs, too.
    """
    if overlay.net is module or module.__dict__.get(MARK) is not overlay.mark:
        return overlay
    pairs = list(_pairs(module))
    memo: dict[int, Any] = {}
    for shared, inner in pairs:
        memo.update(_counterparts(shared.net, inner))
    memo.update({id(shared.net): inner for shared, inner in pairs})
    for _, inner in pairs:
        for table, name in added_to(inner):
            if table == "__dict__":
                inner.__dict__[name] = copy.deepcopy(inner.__dict__[name], memo)
    return module.__dict__["forward"]  # type: ignore[no-any-return]


def _pairs(module: nn.Module) -> Iterator[tuple[Overlay, nn.Module]]:
    """Yield the modules in a copy that have the overlay of another module, with that one."""
    for inner in module.modules():
        shared = inner.__dict__.get("forward")
        if isinstance(shared, Overlay) and shared.net is not inner and inner.__dict__.get(MARK) is shared.mark:
            yield shared, inner


def _counterparts(net: nn.Module, copied: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield, for each module of a net, the one in its place in the copy; itself if that is of another class."""
    modules = dict(copied.named_modules(remove_duplicate=False))
    for path, module in net.named_modules():
        other = modules.get(path)
        yield id(module), module if other is None or type(other) is not type(module) else other


def _copies(overlay: Overlay) -> Iterator[nn.Module]:
    for attributes in gc.get_referrers(overlay.mark):
        for module in gc.get_referrers(attributes):
            if isinstance(module, nn.Module) and module is not overlay.net and module.__dict__ is attributes:
                yield module
