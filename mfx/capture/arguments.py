"""How the arguments of a call are split: tensors go through a graph, all else is fixed in it."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx.capture.captured import CaptureError, Specialization

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, type)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_PLAIN_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def refuse_nested(model: nn.Module, args: Any, kwargs: Any) -> None:
    """A chain's states are tensors of one size, which those whose rows differ in size are not.

    Raises:
        CaptureError: a nested tensor is among the arguments.
    """
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in pytree.tree_leaves((args, kwargs))):
        raise CaptureError(
            f"{type(model).__name__} is given a nested tensor, whose rows differ in size; the states of a chain are of "
            "one size. Give it a padded tensor and a mask, or momentumize parts that take ordinary tensors."
        )


def bind(model: nn.Module, signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, defaults filled in.

    Raises:
        TypeError: they do not fit the signature.
        CaptureError: one of them has no name.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(map(_short, signature.parameters.values()))
        raise TypeError(f"{type(model).__name__}.forward: {error}; it takes ({takes})") from None
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(name):
            raise CaptureError(_nameless(model, f"*{name}"))
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(sorted(arguments.pop(name).items()))
    return arguments


def check_signature(model: nn.Module, signature: inspect.Signature) -> None:
    """Refuse a forward that cannot be traced for want of names.

    Raises:
        CaptureError: all its inputs come in ``*args``, or its arguments have no names for the caller.
    """
    parameters = signature.parameters.values()
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise CaptureError(_nameless(model, f"{parameter.name}, /"))
        if parameter.kind is parameter.VAR_POSITIONAL and not any(p.kind in _NAMED for p in parameters):
            raise CaptureError(_nameless(model, f"*{parameter.name}"))


def specialize(arguments: Mapping[str, Any]) -> Specialization:
    """What a graph for these arguments takes, and what is fixed in it."""
    inputs = tuple(name for name, value in arguments.items() if isinstance(value, Tensor))
    return Specialization(inputs, {name: value for name, value in arguments.items() if name not in inputs})


def specialize_defaults(signature: inspect.Signature) -> Specialization:
    """For arguments at their defaults, those without one being tensors."""
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    inputs = tuple(p.name for p in named if p.default is p.empty or isinstance(p.default, Tensor))
    return Specialization(inputs, {p.name: p.default for p in named if p.name not in inputs})


def key_of(model: nn.Module, specialization: Specialization) -> Hashable:
    """Equal for arguments that the same graph serves.

    Raises:
        CaptureError: an argument is neither a tensor nor a plain value.
    """
    constants = tuple((name, _frozen(model, name, value)) for name, value in specialization.constants.items())
    return specialization.inputs, constants


def _frozen(model: nn.Module, name: str, value: Any) -> Hashable:
    """A plain value as something hashable that tells 1, 1.0 and True apart."""
    if isinstance(value, list | tuple):
        return type(value), tuple(_frozen(model, name, item) for item in value)
    if isinstance(value, dict):
        return type(value), tuple((key, _frozen(model, name, item)) for key, item in value.items())
    if isinstance(value, (*_PLAIN, *_PLAIN_TORCH)):
        return type(value), value
    inside = " with tensors in it" if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)) else ""
    what = f"{type(value).__name__}{inside}"
    if isinstance(value, Tensor):
        what = "container of tensors"
    raise CaptureError(
        f"{type(model).__name__}.forward got a {what} as {name}. A graph can be captured for tensors, and for numbers, "
        "strings, None and lists, tuples and dicts of these: give every tensor an argument of its own."
    )


def _short(parameter: inspect.Parameter) -> str:
    """A parameter without its annotation."""
    return str(parameter.replace(annotation=parameter.empty))


def _nameless(model: nn.Module, name: str) -> str:
    return (
        f"{type(model).__name__}.forward takes inputs without names ({name}), and a graph needs a name for each. Give "
        "forward one named argument per input; if this is a wrapper (DataParallel, for instance), momentumize the "
        "model inside it."
    )
