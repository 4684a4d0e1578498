"""Code that asks whether two values are one object: a trace would answer for proxies, a new one for each result."""

from __future__ import annotations

import linecache
from collections.abc import Collection, Iterable, Mapping
from types import CodeType
from typing import Any

from torch import Tensor, nn

from mfx.capture.captured import CaptureError
from mfx.capture.symbolic.bytecode import identity_checks
from mfx.capture.symbolic.classes import ClassOfValue
from mfx.capture.symbolic.refusals import Refusals, UntraceableError
from mfx.modules.references import is_users, names_in

_WHAT = "it asks whether two values are one object"


def refuse_identity_checks(
    model: nn.Module, codes: Mapping[CodeType, dict[str, Any]], never_traced: Mapping[tuple[CodeType, str], bool]
) -> None:
    """Refuse a model whose code may compare two traced values by ``is``, which no proxy can answer.

    Args:
        model: the model.
        codes: code that may have run, with its variables.
        never_traced: local variables of code of which it is known whether they ever had a traced value.

    Raises:
        CaptureError: it may.
    """
    for code, namespace in codes.items():
        for check in identity_checks(code) if is_users(namespace.get("__name__")) else ():
            is_known = any(never_traced.get((code, name), False) for name in check.variables)
            if not is_known and not _is_known(model, check.paths):
                said = linecache.getline(code.co_filename, check.line or 0).strip()
                where = f"{code.co_filename}:{check.line}, in {code.co_name}: {said}"
                raise CaptureError(
                    f"{type(model).__name__} cannot be traced symbolically: {_WHAT} ({where}), which a trace does not "
                    "know: a tensor may be given twice, and an operation may return the tensor that it got."
                )


def refuse_unseen_code(model: nn.Module, codes: Mapping[CodeType, dict[str, Any]], namespaces: Collection[int]) -> None:
    """Refuse code that a call makes (``exec``) and that asks for classes or identities: it gets those of proxies.

    Args:
        model: the model.
        codes: code that has run, with its variables.
        namespaces: the identities of the variables where the trace answers such questions.

    Raises:
        CaptureError: there is such code.
    """
    for code, namespace in codes.items():
        if id(namespace) not in namespaces and is_users(namespace.get("__name__")) and names_in(code) & {"type", "id"}:
            raise CaptureError(
                f"{type(model).__name__} cannot be traced symbolically: it makes code as it runs, which asks for the "
                f"class or the identity of a value ({code.co_filename}, in {code.co_name})."
            )


def identity_refused(refusals: Refusals) -> Any:
    """Return what a trace has in place of the builtin ``id``."""

    def identity(value: Any, /) -> int:
        if isinstance(value, ClassOfValue):
            refusals.refuse(UntraceableError("it asks for the identity of a traced value"))
        return id(value)

    return identity


def _is_known(model: nn.Module, paths: Iterable[tuple[Any, ...]]) -> bool:
    """True if a model holds both values that are compared, or one that is no tensor.

    A parameter or buffer has one proxy for all of its names, and there are guards for these.
    """
    modules = list(model.modules())
    held = [[value for m in modules if path and (value := _at(m, path)) is not None] for path in paths]
    return all(held) or any(values and not any(isinstance(v, Tensor) for v in values) for values in held)


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    """Return what attributes and items lead to, without properties, whose code would run; None if nothing."""
    for name in map(str, path):  # an item of a list of modules is an attribute
        attributes = getattr(value, "__dict__", {})
        tables = [attributes, *(attributes.get(f"_{kind}") or {} for kind in ("parameters", "buffers", "modules"))]
        value = next((table[name] for table in tables if name in table), None)
    return value
