"""Layers whose modules the user names as steps of a chain, in place of residual adds that are found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph

from mfx.modules.overlay import Overlay
from mfx.options.options import Layer, Options
from mfx_passes import MfxError, Rejection, paths
from mfx_passes.named_steps import NamedSteps, is_mark, is_start, mark_steps, note_calls
from mfx_passes.ops.step_markers import called

_CONTAINERS = (nn.Sequential, nn.ModuleList)


class Block(Overlay):
    """The forward of a module that is a step as a whole: its class's, which also marks the call in a captured graph.

    Args:
        module: the module.
        path: its path in the net.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module = module
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        output = type(self.module).forward(self.module, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if type(output) is tuple and output and isinstance(output[0], Tensor):
            return called(x, output[0], self.path), *output[1:]
        return called(x, output, self.path) if isinstance(output, Tensor) else output


def mark_block_calls(net: nn.Module, layers: Sequence[Layer]) -> None:
    """Have the modules of some layers of a net mark their calls in a graph that TorchDynamo captures."""
    blocks = {block for layer in layers for block in _container(net, layer.path)}
    for path, module in net.named_modules():
        if module in blocks:
            module.__dict__["forward"] = Block(module, path)


class NamedStepModules:
    """The modules of some layers in a model to be captured: each is a step, and called as a whole.

    Args:
        root: the model, or a submodule of it.
        layers: the layers.
        within: path of that submodule in the whole model.
    """

    def __init__(self, root: nn.Module, layers: Sequence[Layer], within: str = "") -> None:
        self._within = within
        here = [layer for layer in layers if paths.is_inside(layer.path, within)]
        found = [(layer, _container(root, paths.relative(layer.path, within))) for layer in here]
        path_of = {module: path for path, module in reversed(list(root.named_modules()))}
        self._rows = [
            NamedSteps(layer.path, tuple(path_of[block] for block in blocks), int(layer.keep_first), layer.is_residual)
            for layer, blocks in found
            if len(blocks)
        ]
        self.modules = frozenset(block for _, blocks in found for block in blocks)

    def mark(self, graph: Graph) -> None:
        """Mark the steps in a captured graph.

        Raises:
            MfxError: the forward does not call the modules of a layer, or does not call them as a chain.
        """
        note_calls(graph, {path for row in self._rows for path in row.blocks})
        notes = graph.find_nodes(op="call_function", target=called)
        for note in notes:
            x, y, path = note.args
            note.args = (x, y, paths.relative(path, self._within))
        called_paths = {note.args[2] for note in notes}
        missing = [row for row in self._rows if called_paths.isdisjoint(row.blocks)]
        for row in () if self._within else missing:
            raise MfxError(
                f"the forward pass does not call {row.blocks[0]}, of the sub layer {row.name}, as a module on its own, "
                "or not for a tensor or a tuple with one in front. "
                "A sub layer is a Sequential or ModuleList of modules that map the state x of a chain to the next; "
                "leave sub_layers out to have residual adds looked for instead."
            )
        mark_steps(graph, [row for row in self._rows if row not in missing])


def named_steps_of(net: nn.Module, options: Options) -> NamedStepModules | None:
    """Return the modules of a net, or of a submodule, that are steps as a whole; None if none were named."""
    return NamedStepModules(net, options.layers, options.within) if options.layers else None


def check_steps(graph: Graph, steps: Mapping[str, int], rejections: Collection[Rejection]) -> None:
    """Check that every marked step became a step of a chain, and every row of them one chain.

    Args:
        graph: the captured graph, with marks.
        steps: the number of steps of each chain that was found.
        rejections: what was not.

    Raises:
        MfxError: something is missing.
    """
    marks = {node.name: node for node in graph.nodes if is_mark(node)}
    if sum(steps.values()) != len(marks) or len(steps) != sum(map(is_start, graph.nodes)):
        reasons = [f"{rejection.path}: {rejection.reason}" for rejection in rejections if rejection.node.name in marks]
        why = "; ".join(reasons) or f"the chains that could be had are {dict(steps)}"
        raise MfxError(
            f"the modules of sub_layers are not a chain of steps that keep the state's shape and dtype. {why}. "
            "keep_first_layer=True leaves the first module of each layer as it is; without sub_layers, residual adds "
            "are looked for and what does not fit is left out."
        )


def check_layer(model: nn.Module, path: Any) -> None:
    """Check that a name is that of a layer of a model.

    Raises:
        MfxError: it is not.
    """
    modules = dict(model.named_modules())
    found = modules.get(path) if isinstance(path, str) and path else None
    if isinstance(found, _CONTAINERS):
        return
    layers = [name for name, module in modules.items() if name and isinstance(module, _CONTAINERS)]
    what = f"is a {type(found).__name__}" if found is not None else "is not there"
    close = get_close_matches(str(path), layers, n=4, cutoff=0.4) or layers[:6]
    raise MfxError(
        f"sub_layers: {path!r} {what} in {type(model).__name__}; looked for a Sequential or ModuleList of that path. "
        f"There are: {', '.join(map(repr, close)) or 'none'}."
    )


def _container(root: nn.Module, path: str) -> Any:
    try:
        module = root.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, _CONTAINERS):
        raise MfxError(f"the sub layer {path} is no longer a Sequential or ModuleList of {type(root).__name__}.")
    return module
