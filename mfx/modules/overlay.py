"""The attributes that mfx adds to the modules of a net, in front of their own, and how to go past them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mfx_passes import paths

MARK = "mfx_mark"


class Mark:
    """Lies beside a module's overlay in ``__dict__``, under `MARK`: whoever copies ``__dict__`` copies it, too."""


class Overlay:
    """A ``forward`` in a module's ``__dict__``, in front of its class's; a tree copy is made without it.

    Attributes:
        net: the module.
        mark: what lies beside it.
        shown: names of the other attributes that came with it.
        is_submodule: True if the module is a submodule of a net, and a capture of the net goes past its overlay.
    """

    net: nn.Module
    mark: Mark
    shown: tuple[str, ...] = ()
    is_submodule = False

    def install(self) -> None:
        """Put the overlay in front of the forward of the module's class."""
        self.net.__dict__.update({"forward": self, MARK: self.mark})


class Extra(nn.Module):
    """A container of modules that mfx added to a net; a tree copy is made without it.

    Attributes:
        names: the names in it of each chain's module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}


def submodule_overlays(net: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield path, module and overlay of every submodule of a net that has one."""
    for path, module in net.named_modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Overlay) and forward.is_submodule and module is not net:
            yield path, module, forward


@contextmanager
def bare_submodules(net: nn.Module) -> Iterator[None]:
    """Within this context, the submodules of a net have the forward of their class, for a capture to go through."""
    overlaid = [(module, forward) for _, module, forward in submodule_overlays(net)]
    for module, _ in overlaid:
        del module.__dict__["forward"]
    try:
        yield
    finally:
        for module, forward in overlaid:
            module.__dict__["forward"] = forward


def drop_overlays(net: nn.Module, called: set[str], leaves: Collection[str]) -> None:
    """Give the modules at these paths, and those inside of them, the forward of their class for good.

    Those inside of ``leaves`` keep theirs: no graph looks in there, so they run chains of their own.
    """
    for path, module, _ in list(submodule_overlays(net)):
        around = set(paths.ancestors(path))
        if not called.isdisjoint(around) and not any(leaf in around for leaf in leaves if leaf != path):
            remove_overlay(module)


def remove_overlay(module: nn.Module) -> None:
    """Give a submodule the forward of its class for good."""
    for name in ("forward", MARK):
        module.__dict__.pop(name, None)  # another thread may have been faster


def added_to(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what mfx has added to a module: the table that it is in (an attribute), and its name there."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, Overlay):
        yield from (("__dict__", name) for name in ("forward", MARK, *forward.shown) if name in module.__dict__)
    yield from (("_modules", name) for name, child in module._modules.items() if isinstance(child, Extra))
