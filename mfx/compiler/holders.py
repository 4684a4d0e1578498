"""Trees of modules over the parameters and buffers that a graph of TorchDynamo's is given as inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mfx import compat
from mfx.compiler.compiled_graphs import CompiledGraph, remember

_KEPT = 8


class Holders:
    """Trees of modules that hold the parameters and buffers of a call under their paths.

    Dynamo runs one graph for all models of a class, so each set of tensors has its own tree; a backward pass reads the
    tree of its forward pass.

    Args:
        paths: for each input of the graph, the path to read it by; None if it stays an input.
    """

    def __init__(self, paths: Sequence[str | None]) -> None:
        self._paths = [(position, path) for position, path in enumerate(paths) if path is not None]
        self._made: dict[tuple[int, ...], nn.Module] = {}
        self._graphs: dict[nn.Module, CompiledGraph] = {}
        self._describe: Callable[[nn.Module], CompiledGraph] | None = None

    def register(self, describe: Callable[[nn.Module], CompiledGraph]) -> None:
        """Register the graph under the tensors of these trees, and of those that will be made."""
        self._describe = describe
        for net in self._made.values():
            self._remember(net)

    def _remember(self, net: nn.Module) -> None:
        if self._describe is not None:
            self._graphs[net] = self._describe(net)
            remember(self._graphs[net])

    def of(self, values: Sequence[Any]) -> nn.Module:
        """Return the tree for these inputs of the graph."""
        key = tuple(id(values[position]) for position, _ in self._paths)
        if key not in self._made:
            self._made[key] = self._make(values)
            self._remember(self._made[key])
            while len(self._made) > _KEPT:
                self._graphs.pop(self._made.pop(next(iter(self._made))), None)
        return self._made[key]

    @compat.without_function_modes()  # for later calls it is made
    def _make(self, values: Sequence[Any]) -> nn.Module:
        root = nn.Module()
        for position, path in self._paths:
            *outer, name = path.split(".")
            module, tensor = root, values[position]
            for part in outer:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(name, tensor)
            else:
                module.register_buffer(name, tensor)
        return root
