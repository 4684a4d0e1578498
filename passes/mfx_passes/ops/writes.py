"""The values that an operation changes in place beside the one that it may return: statistics, lists, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from mfx_passes.ops import vocabulary

_STATISTICS = ("running_mean", "running_var")
_OF_TORCH = ("input", "weight", "bias", *_STATISTICS)
_OF_FUNCTIONAL = ("input", *_STATISTICS, "weight", "bias")

_NORMS = (nn.modules.batchnorm._NormBase,)

_OVERLOAD = type(torch.ops.aten.add.Tensor)
_LISTS = re.compile(r"_foreach_\w+_")

_WRITES: Mapping[Any, tuple[tuple[str, ...], tuple[str, ...], str, Any]] = {
    # the names of the arguments, those that are changed, the one that says so, and its default
    F.batch_norm: ((*_OF_FUNCTIONAL, "training"), _STATISTICS, "training", False),
    F.instance_norm: ((*_OF_FUNCTIONAL, "use_input_stats"), _STATISTICS, "use_input_stats", True),
    torch.batch_norm: ((*_OF_TORCH, "training"), _STATISTICS, "training", False),
    torch.instance_norm: ((*_OF_TORCH, "use_input_stats"), _STATISTICS, "use_input_stats", True),
    torch.native_batch_norm: ((*_OF_TORCH, "training"), _STATISTICS, "training", False),
    F.embedding: (("input", "weight", "padding_idx", "max_norm"), ("weight",), "max_norm", None),
    F.embedding_bag: (("input", "weight", "offsets", "max_norm"), ("weight",), "max_norm", None),
}


def written_beside(node: Node, modules: vocabulary.Modules) -> Iterator[Node]:
    """Yield the values that a node changes in place, but for `vocabulary.mutated_operand`.

    A module that mfx made has the positions of the arguments that it changes in its attribute ``_mfx_writes``.

    Args:
        node: the node.
        modules: the modules that nodes call.
    """
    first = vocabulary.mutated_operand(node, modules)
    yield from dict.fromkeys(leaf for leaf in _written(node, modules) if isinstance(leaf, Node) and leaf is not first)


def changes_buffers(module: nn.Module | None) -> bool:
    """True if a call of a module may change buffers of its own."""
    if module is None or not type(module).__module__.startswith("torch.nn.modules"):
        return True
    inner = list(module.modules())
    return any(isinstance(each, _NORMS) and each.training and each.track_running_stats for each in inner) or any(
        not type(each).__module__.startswith("torch.nn.modules") for each in inner
    )


def _written(node: Node, modules: vocabulary.Modules) -> Iterator[Any]:
    if node.op == "call_module":
        own = getattr(modules.get(str(node.target)), "__dict__", {})  # getattr may find any name in a user's
        yield from (node.args[position] for position in own.get("_mfx_writes", ()))
    elif isinstance(node.target, _OVERLOAD):
        schema = node.target._schema.arguments
        given = {**dict(zip((argument.name for argument in schema), node.args, strict=False)), **node.kwargs}
        written = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
        if given.get("training", given.get("use_input_stats")):  # which some schemas do not say
            written += _STATISTICS
        yield from pytree.tree_leaves([given.get(name) for name in written])
    elif node.op == "call_function" and node.target in _WRITES:
        names, changed, flag, default = _WRITES[node.target]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get(flag, default) not in (False, None):
            yield from (given.get(name) for name in changed)
    elif node.op == "call_function" and node.args and _LISTS.fullmatch(getattr(node.target, "__name__", "")):
        yield from pytree.tree_leaves(node.args[0])
