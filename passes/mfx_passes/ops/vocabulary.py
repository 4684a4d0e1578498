"""The effects of single nodes: in-place changes, preserved values, sizes, tails."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from mfx_passes.ops import packing, rearrange
from mfx_passes.ops.joins import joined

Modules = Mapping[str, nn.Module]

NEUTRAL = ("neutral",)
RESHAPE = ("reshape",)
RESHAPES = frozenset({"reshape", "merged", "parted"})
"""The names of layouts of operations that keep the order of the elements."""

_NEUTRAL_METHODS = frozenset({"contiguous", "to", "clone", "float", "double", "half", "bfloat16", "type", "type_as"})
_NEUTRAL_FUNCTIONS = frozenset({torch.clone})
_RESHAPE_METHODS = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
)
_RESHAPE_FUNCTIONS = frozenset({torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze})
_PERMUTE = frozenset({"permute", torch.permute})
_TRANSPOSE = frozenset({"transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims})

_SIZE_METHODS = frozenset(
    {"size", "dim", "numel", "ndimension", "stride", "__len__", "element_size", "is_floating_point"}
)
_SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"})

_TAIL_FUNCTIONS = frozenset(
    {
        torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.clamp, torch.dropout, torch.rms_norm,
        torch.layer_norm, F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.selu, F.celu, F.gelu,
        F.silu, F.mish, F.hardswish, F.hardtanh, F.prelu, F.softplus, F.tanh, F.sigmoid, F.dropout, F.layer_norm,
        F.rms_norm, F.batch_norm, F.group_norm, F.instance_norm, F.normalize,
    }
)  # fmt: skip
_TAIL_METHODS = frozenset({"relu", "relu_", "tanh", "sigmoid", "clamp", "to", "float", "half", "bfloat16", "type_as"})
_TAIL_MODULE_FILES = ("activation", "batchnorm", "dropout", "instancenorm", "normalization")
_SCALE = frozenset({operator.mul, operator.truediv, torch.mul, torch.div})

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor", "setitem")
)

_INPLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _INPLACE_OPERATORS)


def mutated_operand(node: Node, modules: Modules) -> Node | None:
    """Return the node whose value this one changes in place, None if it changes none."""
    if isinstance(out := node.kwargs.get("out"), Node):
        return out
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, Node) and _mutates(node, modules) else None


def returns_operand(node: Node) -> bool:
    """True if an in-place operation is known to return what it changed; functions other than torch's are not known."""
    if node.op == "call_function":
        module = getattr(node.target, "__module__", None) or ""
        return node.target is not operator.setitem and module.startswith(("torch", "_operator"))
    return node.target != "__setitem__"


def _mutates(node: Node, modules: Modules) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules.get(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return _is_inplace_name(str(node.target))
    if node.op != "call_function" or not callable(node.target):
        return False
    if getattr(node.target, "__module__", None) == "_operator":  # operator.and_ only avoids a keyword
        return node.target in _INPLACE_OPERATORS
    return _is_inplace_name(getattr(node.target, "__name__", "")) or _has_inplace_argument(node)


def _is_inplace_name(name: str) -> bool:
    """True for ``add_``, ``__iadd__`` and ``__setitem__``, but not for ``__add__`` or ``__invert__``."""
    if name.endswith("__"):
        return name == "__setitem__" or name in _INPLACE_METHODS
    return name.endswith("_")


def _has_inplace_argument(node: Node) -> bool:
    if node.kwargs.get("inplace"):
        return True
    position = _inplace_position(node.target)
    return position is not None and len(node.args) > position and bool(node.args[position])


@lru_cache(maxsize=4096)
def _inplace_position(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built-in functions have no signature, and no inplace argument
        return None
    return names.index("inplace") if "inplace" in names else None


def layout(node: Node, modules: Modules) -> tuple[Any, ...] | None:
    """Return how a value-preserving operation moves the elements of the value that it preserves; None for others.

    ``NEUTRAL`` leaves every element in its place (all pieces of a value put together do, see `joins`), ``RESHAPE``,
    ``("merged", before, after)`` and ``("parted", before, after)`` keep their order, see `packing`; ``("permute",
    dims)`` and ``("transpose", a, b)`` move dimensions, ``("rearrange", left, right)`` moves axes, which dimensions are
    made of, as in einops.
    """
    if joined(node) is not None:
        return NEUTRAL
    if (rearranged := rearrange.pattern(node, modules)) is not None:
        return rearranged.layout
    if (packed := packing.layout(node)) is not None:
        return packed
    if not node.args or not isinstance(node.args[0], Node):
        return _adds_zero(node)
    if node.op == "call_module":
        return NEUTRAL if type(modules.get(str(node.target))) is nn.Identity else None
    target = node.target
    if (node.op == "call_method" and target in _NEUTRAL_METHODS) or target in _NEUTRAL_FUNCTIONS:
        return NEUTRAL
    if (node.op == "call_method" and target in _RESHAPE_METHODS) or target in _RESHAPE_FUNCTIONS:
        reinterprets = any(
            isinstance(arg, torch.dtype) for arg in (*node.args, *node.kwargs.values())
        )  # x.view(torch.int32)
        return None if reinterprets else RESHAPE
    if target in _PERMUTE:
        return _constant_dims("permute", _flat(node.args[1:]) or _flat([node.kwargs.get("dims", ())]))
    if target in _TRANSPOSE:
        return _constant_dims("transpose", tuple(node.args[1:]))
    return _adds_zero(node)


def _adds_zero(node: Node) -> tuple[Any, ...] | None:
    """Return ``NEUTRAL`` for ``0 + x``, with which ``sum([x, f])`` begins."""
    if node.target is operator.add and len(node.args) == 2 and any(type(a) is int and a == 0 for a in node.args):
        return NEUTRAL
    return None


_ALIAS_NAMES = frozenset(
    {
        "alpha_dropout", "as_strided", "broadcast_to", "chunk", "detach", "diagonal", "dropout", "dropout1d",
        "dropout2d", "dropout3d", "dsplit", "expand", "expand_as", "hsplit", "moveaxis", "movedim", "narrow",
        "rearrange", "select", "split", "squeeze", "swapaxes", "t", "tensor_split", "unbind", "unfold", "unsqueeze",
        "view_as_complex", "view_as_real", "vsplit", "started", "adjoint", "atleast_1d", "atleast_2d", "atleast_3d",
        "_get_data_attr",
    }
)  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_ALIAS_ATTRIBUTES = frozenset({"T", "H", "mT", "mH", "data", "real", "imag"})


def may_alias(node: Node, modules: Modules) -> bool:
    """True if the value of a node may share memory with its first argument without having changed it."""
    if joined(node) is not None:
        return False
    if not (node.args and isinstance(node.args[0], Node)):
        return layout(node, modules) is not None
    if layout(node, modules) is not None:
        return True
    if node.op == "call_module":
        module = modules.get(str(node.target))
        # In eval mode, dropout returns its input.
        return isinstance(module, (*_DROPOUTS, nn.Flatten, nn.Unflatten)) or type(module).__name__ == "Rearrange"
    if node.target is getattr:
        return node.args[1] in _ALIAS_ATTRIBUTES
    if node.op == "call_function":
        return node.target is operator.getitem or getattr(node.target, "__name__", "") in _ALIAS_NAMES
    return node.op == "call_method" and node.target in _ALIAS_NAMES


def preserved(node: Node) -> Node:
    """Return the value that a value-preserving operation preserves."""
    return joined(node) or next(arg for arg in node.args if isinstance(arg, Node))


def _flat(args: Any) -> tuple[Any, ...]:
    return tuple(x for arg in args for x in (arg if isinstance(arg, list | tuple) else (arg,)))


def _constant_dims(kind: str, dims: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (kind, *dims) if dims and all(type(d) is int for d in dims) else None


def undoes(after: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """True if one value-preserving operation may undo another (for reshapes: if the shape is restored)."""
    if before[0] in RESHAPES:
        return after[0] in RESHAPES and (RESHAPE in (before, after) or packing.are_inverse(after, before))
    if before[0] == "rearrange":
        return after[0] == "rearrange" and rearrange.are_inverse(after[1:], before[1:])
    if before[0] == "transpose":
        return after[0] == "transpose" and set(after[1:]) == set(before[1:])
    if before[0] == "permute" and after[0] == "permute" and len(after) == len(before):
        rank = len(before) - 1
        return all(before[1 + after[1 + i] % rank] % rank == i for i in range(rank))
    return False


def are_undone(moved: Iterable[tuple[Any, ...] | None]) -> bool:
    """True if value-preserving operations in a row undo each other (for reshapes: if the shape is restored)."""
    pending: list[tuple[Any, ...]] = []
    for kind in moved:
        if pending and kind is not None and undoes(kind, pending[-1]):
            pending.pop()
        else:
            pending.append(kind or ())
    return not pending


def is_size(node: Node, sizes: set[Node]) -> bool:
    """True if a node is a size, dtype or device and not a tensor; ``sizes`` are those already known."""
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    inputs = node.all_input_nodes
    return bool(inputs) and all(x in sizes for x in inputs) and _is_python(node.target)


def _is_python(function: Callable[..., Any] | str) -> bool:
    return getattr(function, "__module__", None) in ("_operator", "builtins", "math")


def reads_size_only(node: Node) -> bool:
    """True if a node reads only the size, dtype or device of its argument."""
    return is_size(node, set())


def is_tail(node: Node, modules: Modules) -> bool:
    """True if a node may stand between a sum and the next skip: activation, normalisation, dropout, cast, scale."""
    if node.op == "call_module":
        module = type(modules.get(str(node.target)))
        file = module.__module__.rpartition(".")[2]
        if module in (nn.Identity, nn.MultiheadAttention):
            return module is nn.Identity
        return module.__module__.startswith("torch.nn.modules.") and file in _TAIL_MODULE_FILES
    if node.op == "call_method":
        return node.target in _TAIL_METHODS
    if node.target in _SCALE:
        return len([a for a in node.args if isinstance(a, Node) and a.op != "get_attr"]) == 1
    return node.op == "call_function" and node.target in _TAIL_FUNCTIONS


def signature(node: Node, modules: Modules) -> Any:
    """Return what two tails must have in common, operation by operation, to be of one kind."""
    if (moved := layout(node, modules)) not in (None, NEUTRAL):
        return moved
    if node.op == "call_module":
        return type(modules.get(str(node.target)))
    return node.target


_DRAWING = re.compile(
    r"dropout|rand|normal(?!i[sz])|bernoulli|uniform|exponential|geometric|cauchy|poisson|multinomial|rrelu|gumbel|fractional"
    r"|multi_?head|transformer|gru|lstm|rnn",
    re.IGNORECASE,
)


def may_draw(node: Node, modules: Modules) -> bool:
    """True unless a node is known to draw no random numbers: modules and functions that are not torch's may."""
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return module is None or any(
            not type(each).__module__.startswith("torch.nn.modules") or _DRAWING.search(type(each).__name__)
            for each in module.modules()
        )
    if node.op == "call_method":
        return _DRAWING.search(str(node.target)) is not None
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if name == "scaled_dot_product_attention":
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0))
    home = getattr(node.target, "__module__", None) or ""
    is_known = not home or home.startswith("torch") or home in ("_operator", "builtins", "math")
    return not is_known or _DRAWING.search(name) is not None
