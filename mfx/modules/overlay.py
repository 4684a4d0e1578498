"""What stands in front of a model's own attributes in a tree copy, and how to look past it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mfx_passes import paths


class Overlay:
    """What stands in a module's ``__dict__`` as ``forward``, in front of its class's; a tree copy is made without it.

    Attributes:
        shown: names of the other attributes that came with it.
        is_part: whether the module is a part of a net, and a capture of the net goes past its overlay.
    """

    shown: tuple[str, ...] = ()
    is_part = False


class Extra(nn.Module):
    """Holds the modules that mfx added to a net; a tree copy is made without it.

    Attributes:
        names: what each chain's module is called here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, str] = {}


@contextmanager
def without_parts(net: nn.Module) -> Iterator[None]:
    """Within this context, the parts of a net have the forward of their class, for a capture to go through."""
    parts = {
        module: forward
        for module in net.modules()
        if module is not net and isinstance(forward := module.__dict__.get("forward"), Overlay) and forward.is_part
    }
    for module in parts:
        del module.__dict__["forward"]
    try:
        yield
    finally:
        for module, forward in parts.items():
            module.__dict__["forward"] = forward


def drop_parts(net: nn.Module, called: set[str]) -> None:
    """Give the modules at these paths, and those inside of them, the forward of their class for good."""
    for path, module in net.named_modules():
        forward = module.__dict__.get("forward")
        if path and isinstance(forward, Overlay) and forward.is_part and not called.isdisjoint(paths.ancestors(path)):
            del module.__dict__["forward"]


def _overlaid(module: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that momentumize gave an instance."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, Overlay):
        return ()
    return tuple(name for name in ("forward", *forward.shown) if name in module.__dict__)


def _extras(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if isinstance(child, Extra)]
