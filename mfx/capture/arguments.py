"""Split the arguments of a call by name: tensors go through a graph, all else is fixed in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.binding import ByName, NotPlainError, frozen
from mfx.capture.captured import CaptureError

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@compat.without_function_modes()  # which are told of what is read
def has_nested(args: Any, kwargs: Any) -> bool:
    """True if a nested tensor is among the arguments."""
    return any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in pytree.tree_leaves((args, kwargs)))


def refuse_nested(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Refuse nested tensors: their rows differ in size, and the states of a chain are tensors of one size.

    Raises:
        CaptureError: a nested tensor is among the arguments.
    """
    if has_nested(args, kwargs):
        raise CaptureError(
            f"{type(model).__name__} is given a nested tensor, whose rows differ in size; the states of a chain are of "
            "one size. Give it a padded tensor and a mask, or momentumize parts that take ordinary tensors."
        )


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


def bind(model: nn.Module, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ByName:
    """Bind the arguments of a call by name, defaults filled in.

    Raises:
        TypeError: they do not fit the signature.
        CaptureError: one of them has no name.
    """
    arguments = _by_name(model, signature, args, kwargs)
    return _split(signature, arguments, [name for name, value in arguments.items() if isinstance(value, Tensor)])


def bind_defaults(signature: inspect.Signature) -> ByName:
    """Bind arguments at their defaults, those without one being tensors."""
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    inputs = [p.name for p in named if p.default is p.empty or isinstance(p.default, Tensor)]
    return _split(signature, {p.name: p.default for p in named}, inputs)


def check_constants(model: nn.Module, binding: ByName) -> None:
    """Check that every argument is a tensor or plain.

    Raises:
        CaptureError: one of them is neither.
    """
    for name, value in binding.constants.items():
        _check_plain(model, name, value)


def _check_plain(model: nn.Module, name: str, value: Any) -> None:
    try:
        frozen(value)
    except NotPlainError as error:
        found = error.value
        has_tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(found))
        what = f"{type(found).__name__}{' with tensors in it' if has_tensors else ''}"
        raise CaptureError(
            f"{type(model).__name__}.forward got a {'container of tensors' if isinstance(found, Tensor) else what} as "
            f"{name}. A graph can be captured for tensors, and for numbers, strings, None and lists, tuples and dicts "
            "of these: give every tensor an argument of its own."
        ) from None


def _by_name(
    model: nn.Module, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
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
            if clash := arguments[name].keys() & set(_positional_only(signature)):
                raise CaptureError(_nameless(model, f"{min(clash)}, /, **{name}"))
            arguments.update(sorted(arguments.pop(name).items()))
    return arguments


def call_by_name(forward: Callable[..., Any], model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Call a forward, a function of the model, with arguments by name: by position those that cannot come by name."""
    signature, own = (inspect.signature(forward, follow_wrapped=follow) for follow in (True, False))
    takes_names = own.parameters.keys() >= signature.parameters.keys() or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in own.parameters.values()
    )  # a decorator may pass on positions alone
    by_position = _positional_only(signature) if takes_names else signature.parameters
    names = [name for name in by_position if name in arguments]
    others = {name: value for name, value in arguments.items() if name not in names}
    return forward(model, *[arguments[name] for name in names], **others)


def _positional_only(signature: inspect.Signature) -> tuple[str, ...]:
    return tuple(p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_ONLY)


def _split(signature: inspect.Signature, arguments: Mapping[str, Any], inputs: Sequence[str]) -> ByName:
    parameters = signature.parameters.values()
    return ByName(
        tuple(inputs),
        {name: value for name, value in arguments.items() if name not in inputs},
        tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)),
        _positional_only(signature),
        {p.name: p.default for p in parameters if p.default is not p.empty},
    )


def _short(parameter: inspect.Parameter) -> str:
    """Return a parameter as text, without its annotation."""
    return str(parameter.replace(annotation=parameter.empty))


def _nameless(model: nn.Module, name: str) -> str:
    return (
        f"{type(model).__name__}.forward takes inputs without names ({name}), and a graph needs a name for each. Give "
        "forward one named argument per input; if this is a wrapper (DataParallel, for instance), momentumize the "
        "model inside it."
    )
