"""The outputs a call will have, inferred on fake tensors and checked after the real run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx_passes import MfxError


@dataclass(frozen=True)
class FromInput:
    """An output that is an input: the ``position``-th of the net's arguments, parameters and buffers."""

    position: int


@dataclass(frozen=True)
class Produced:
    """An output that the net computes, the ``position``-th of these."""

    position: int


@dataclass(frozen=True)
class OutputSpec:
    """The outputs of a call, as far as compiled code depends on them.

    Attributes:
        leaves: type and value of each returned leaf, with `Produced` and `FromInput` for tensors.
        treespec: the structure they are in.
        kinds: dtype, device and sizes of each produced tensor, None for a symbolic size.
        used: positions of the inputs that require a gradient and that the results depend on.
        differentiable: positions of the produced tensors that require a gradient.
    """

    leaves: tuple[tuple[type, Any], ...]
    treespec: Any
    kinds: tuple[tuple[torch.dtype, torch.device, tuple[int | None, ...]], ...]
    used: tuple[int, ...]
    differentiable: tuple[int, ...]

    def difference(self, real: OutputSpec) -> str | None:
        """Describe the first difference that matters to code compiled for this spec, or return None."""
        if (self.leaves, self.treespec) != (real.leaves, real.treespec):
            return f"returned {real.structure} instead of {self.structure}"
        for expected, found in zip(self.kinds, real.kinds, strict=True):
            if expected[:2] != found[:2] or not _sizes_agree(expected[2], found[2]):
                return f"returned a tensor of {_kind_text(found)} instead of {_kind_text(expected)}"
        if not {*real.used} <= {*self.used} or not {*real.differentiable} <= {*self.differentiable}:
            return "returned what depends on other parameters or inputs"
        return None

    @property
    def sizes(self) -> list[list[int]] | None:
        """The sizes of all produced tensors; None if some are symbolic."""
        found = [[size for size in sizes if size is not None] for _, _, sizes in self.kinds]
        return found if all(None not in sizes for _, _, sizes in self.kinds) else None

    @property
    def structure(self) -> Any:
        """The net's result, with `Produced` and `FromInput` for tensors."""
        return pytree.tree_unflatten([value for _, value in self.leaves], self.treespec)


def describe_outputs(net: nn.Module, returned: Any, given: Sequence[Tensor]) -> tuple[OutputSpec, list[Tensor]]:
    """Return the output spec of a call, and the tensors that it produced.

    Args:
        net: the net, for messages.
        returned: its result.
        given: its arguments, parameters and buffers, as leaves of the autograd graph.

    Raises:
        MfxError: it returned something that is neither a tensor nor a plain value, or depends on a tensor that
            requires a gradient and is not among the given ones.
    """
    values, treespec = pytree.tree_flatten(returned)
    places: dict[int, Produced | FromInput] = {id(tensor): FromInput(at) for at, tensor in enumerate(given)}
    results: list[Tensor] = []
    leaves = []
    for value in values:
        if isinstance(value, Tensor) and id(value) not in places:
            places[id(value)] = Produced(len(results))
            results.append(value)
        leaf = places[id(value)] if isinstance(value, Tensor) else _checked_value(net, value)
        leaves.append((type(leaf), leaf))
    differentiable = tuple(at for at, result in enumerate(results) if result.requires_grad)
    reached = compat.leaves_of([results[at] for at in differentiable])
    wanted = {id(tensor): at for at, tensor in enumerate(given) if tensor.requires_grad}
    if reached - wanted.keys():
        raise MfxError(
            f"{type(net).__name__} reads a tensor that requires a gradient and is neither an argument nor a parameter, "
            "so code that torch.compile compiled would give it none. Make it an nn.Parameter of the model or an "
            "argument."
        )
    used = tuple(sorted(wanted[key] for key in reached))
    kinds = tuple((result.dtype, result.device, tuple(map(_size, result.shape))) for result in results)
    return OutputSpec(tuple(leaves), treespec, kinds, used, differentiable), results


def is_plain(value: object) -> bool:
    """True if a value that is not a tensor may come out of a graph."""
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def _checked_value(net: nn.Module, value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return int(value)
    if is_plain(value):
        return value
    raise MfxError(
        f"{type(net).__name__} returns a {type(value).__name__}, which cannot come out of a graph that torch.compile "
        "makes. Have it return tensors and plain values (of a Hugging Face model: pass use_cache=False), or compile "
        "without fullgraph=True."
    )


def _size(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _sizes_agree(sizes: tuple[int | None, ...], others: tuple[int | None, ...]) -> bool:
    return len(sizes) == len(others) and all(
        a is None or b is None or a == b for a, b in zip(sizes, others, strict=True)
    )


def _kind_text(kind: tuple[torch.dtype, torch.device, tuple[int | None, ...]]) -> str:
    dtype, device, sizes = kind
    return f"{dtype} on {device} of shape ({', '.join('?' if size is None else str(size) for size in sizes)})"
