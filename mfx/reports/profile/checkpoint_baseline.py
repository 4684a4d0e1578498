"""The baseline with ``torch.utils.checkpoint`` around the blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from mfx.net.views import View
from mfx_passes import StepGraphs
from mfx_passes.paths import ancestors, is_inside, join


class Checkpointed:
    """A model with ``torch.utils.checkpoint`` (non-reentrant) around some of its modules.

    Args:
        net: the model; these modules' ``forward`` is replaced on the instance.
        paths: paths of the modules.

    Attributes:
        called: paths of the modules that were called, in the order of their first call. A model may skip a module and
            call only what is inside it.
    """

    def __init__(self, net: nn.Module, paths: Iterable[str]) -> None:
        self.net = net
        self.called: dict[str, None] = {}
        for path in paths:
            module = net.get_submodule(path)
            module.forward = self._checkpointing(path, module.forward)

    def _checkpointing(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.called[path] = None
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run


def blocks_of(net: nn.Module, views: Iterable[View]) -> tuple[str, ...]:
    """Return the modules that a user would checkpoint in the place of what mfx runs again: the model's blocks.

    A block is the smallest module with one or more whole branches of a chain in it, but not with all of them: a
    ``Bottleneck`` of a ResNet, an ``EncoderBlock`` of a ViT. Where the branches have no such module, because the code
    of the blocks stands in a loop around them, it is the modules that they call. Blocks in no chain that run again are
    among them.

    Args:
        net: the model.
        views: what there is to say about its graphs.

    Returns:
        Paths of modules, none of them inside another.
    """
    found: dict[str, None] = {}
    for view in views:
        for call in view.calls.values():
            for step in call.graphs.steps:
                targets = [join(view.path, target) for target in step.targets]
                found.update(dict.fromkeys([step.path] if _is_block(step.path, call.graphs.steps) else targets))
        found.update(dict.fromkeys(view.blocks))
    called = {path for path in found if _is_called(net, path)}
    return tuple(path for path in found if path in called and called.isdisjoint(ancestors(path)[:-1]))


def _is_block(path: str, steps: Sequence[StepGraphs]) -> bool:
    inside = sum(is_inside(step.path, path) for step in steps)
    return path != "" and (inside < len(steps) or inside == 1)


def _is_called(net: nn.Module, path: str) -> bool:
    """True if there is a module that computes something, which a ``ModuleList`` does not."""
    module: Any = net
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module) and type(module).forward is not nn.Module.forward
