"""Attributes of classes that a call sets, which TorchDynamo reads through objects and derived classes as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from unittest.mock import patch

from torch._dynamo.exc import unimplemented
from torch._dynamo.variables import (
    ConstantVariable,
    UnspecializedNNModuleVariable,
    UserDefinedClassVariable,
    UserDefinedObjectVariable,
)

_KINDS = (UserDefinedClassVariable, UserDefinedObjectVariable, UnspecializedNNModuleVariable)
_READ = ("tp_getattro_impl", "var_getattr")  # the second until torch 2.13


@contextmanager
def class_attributes_as_in_python() -> Iterator[None]:
    """Within this context Dynamo reads what the code has set on a class through its objects and derived classes, too.

    Torch 2.11 to 2.14 look for it in what the classes held before the call, without a word.
    """
    with ExitStack() as stack:
        for kind in _KINDS:
            for name in (name for name in _READ if name in vars(kind)):
                stack.enter_context(patch.object(kind, name, _reading(vars(kind)[name])))
            if "call_obj_hasattr" in vars(kind):
                stack.enter_context(patch.object(kind, "call_obj_hasattr", _asking(vars(kind)["call_obj_hasattr"])))
        yield


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: Any, tx: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        found = _set_in_call(self, tx, name)
        if found is None:
            return original(self, tx, name, *args, **kwargs)
        if not found.is_python_constant() or isinstance(found.as_python_constant(), FunctionType):
            unimplemented(
                gb_type="a class attribute that was set in the call is read through an object",
                context=f"{name} of {self}",
                explanation="it may have to be bound to the object.",
                hints=[],
            )
        return found

    return read


def _asking(original: Callable[..., Any]) -> Callable[..., Any]:
    def ask(self: Any, tx: Any, name: Any) -> Any:
        if _set_in_call(self, tx, name) is None:
            return original(self, tx, name)
        return ConstantVariable.create(value=True)

    return ask


def _set_in_call(variable: Any, tx: Any, name: Any) -> Any:
    """Return what the code has set on a class that a variable has an attribute from; None if it has set nothing."""
    stored = tx.output.side_effects.store_attr_mutations
    of_classes = {item.value: held for item, held in stored.items() if isinstance(item, UserDefinedClassVariable)}
    if not any(name in held for held in of_classes.values()):
        return None
    is_class = isinstance(variable, UserDefinedClassVariable)
    own = () if is_class else (*getattr(variable.value, "__dict__", ()), *stored.get(variable, ()))
    if name in own:
        return None
    for cls in (variable.value if is_class else type(variable.value)).__mro__:
        if name in of_classes.get(cls, ()):
            return of_classes[cls][name]
        if name in vars(cls):
            return None
    return None
