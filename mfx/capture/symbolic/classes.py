"""The class of a traced value, for code that asks for it: ``isinstance``, ``type``, ``case Tensor():``."""

from __future__ import annotations

import builtins
import inspect
import operator
import sys
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from mfx.capture.symbolic.bytecode import asks_for_class
from mfx.capture.symbolic.call_values import UNKNOWN, CallValues

_OURS = ("mfx.", "torch.fx", "torch.overrides")
_NOT_TENSORS = (tuple, list, dict, str, int, float, torch.Size)
_EXAMPLE = torch.empty((1, 1))
_NAMES = ("add", "sub", "mul", "truediv", "pow", "matmul", "neg", "iadd", "isub", "imul", "itruediv")
_ARITHMETIC = {getattr(operator, name) for name in _NAMES}


def is_class_check(frame: FrameType) -> bool:
    """True if the running code is that of a class which decides itself what its instances are."""
    return frame.f_code.co_name == "__instancecheck__"


def is_of_trace(frame: FrameType) -> bool:
    """True if the running code is of the trace, not of the model."""
    return str(frame.f_globals.get("__name__", "")).startswith(_OURS)


class OfTrace:
    """An attribute of a traced value that the value has not: the code of a model does not find it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, value: Any, owner: type | None = None) -> Any:
        if value is None or not is_of_trace(sys._getframe(1)):
            raise AttributeError(self._name)
        return value.__dict__[self._name]

    def __set__(self, value: Any, found: Any) -> None:
        value.__dict__[self._name] = found


class ClassOfValue:
    """An object that has the class of its value, for code outside of the trace; it has a method ``class_of_value``.

    Attributes:
        as_proxy: the class of torch.fx whose instances these objects are to torch.fx, and to nobody else.
    """

    as_proxy: type[fx.Proxy]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the value, where Python code asks for it; torch's code in C sees neither that nor a proxy."""
        frame = sys._getframe(1)
        while is_class_check(frame) and frame.f_back is not None:
            frame = frame.f_back
        if is_of_trace(frame):
            return type(self).as_proxy
        if not asks_for_class(frame):
            return type(self)
        return type(self).class_of_value(self)  # type: ignore[attr-defined]


class _TypeOfValue(builtins.type):
    """The class of `type_of_value`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], ClassOfValue):
            return type(args[0]).class_of_value(args[0])  # type: ignore[attr-defined]
        return type(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, type)


class type_of_value(builtins.type, metaclass=_TypeOfValue):  # noqa: N801
    """The builtin ``type`` as the code of a model sees it in a trace: of a traced value, the class of the value."""


def known_class(proxy: fx.Proxy, root: nn.Module, values: CallValues | None) -> type | None:
    """Return the class of a traced value; None if it is not known.

    Args:
        proxy: the proxy for the value.
        root: the model.
        values: what is known of the call that the trace is made for.
    """
    if isinstance(proxy, fx.proxy.Attribute):
        return _class_of_attribute(_class(proxy.root.node, root), proxy.attr)
    if values is not None and (value := values.of(proxy.node)) is not UNKNOWN:
        return Tensor if isinstance(value, Tensor) and proxy.node.op != "get_attr" else type(value)
    if values is not None and (number := class_of_item(proxy.node, values)) is not None:
        return number
    return _class(proxy.node, root)


def class_of_item(node: fx.Node, values: CallValues) -> type | None:
    """Return the class of the number that a node reads off a tensor; None if it does not, or this is not known."""
    if node.op != "call_method" or node.target != "item":
        return None
    tensor = values.of(node.all_input_nodes[0])
    if not isinstance(tensor, Tensor):
        return None
    if tensor.dtype is torch.bool:
        return bool
    return complex if tensor.is_complex() else float if tensor.is_floating_point() else int


def _class(node: fx.Node, root: nn.Module) -> type | None:
    """Return the class of what a node computes, if it is the same in all calls."""
    target: Any = node.target
    match node.op:
        case "placeholder":
            return Tensor
        case "get_attr":
            return type(operator.attrgetter(str(target))(root))
        case "call_module":
            forward = type(root.get_submodule(str(target))).forward
            return Tensor if forward.__module__.startswith("torch.nn") and _is_annotated_tensor(forward) else None
        case "call_method" if target == "size":
            return int if len(node.args) + len(node.kwargs) > 1 else torch.Size
        case "call_method":
            return None if any(hasattr(cls, target) for cls in _NOT_TENSORS) else _returned(target)
        case "call_function" if target in _ARITHMETIC:
            classes = [_class(arg, root) for arg in reversed(node.all_input_nodes)]
            return Tensor if any(cls is not None and issubclass(cls, Tensor) for cls in classes) else None
        case "call_function" if target is operator.getitem:
            return _class_of_item(_class(node.all_input_nodes[0], root), node.args[1])
        case "call_function" if target is getattr:
            return _class_of_attribute(_class(node.all_input_nodes[0], root), str(node.args[1]))
        case "call_function" if _is_torchs(target):
            return _returned(target.__name__)
    return None


def _class_of_attribute(cls: type | None, name: str) -> type | None:
    if cls is None or not issubclass(cls, Tensor):
        return None
    found = type(getattr(_EXAMPLE, name))
    return None if found is type(None) else found


def _class_of_item(cls: type | None, index: Any) -> type | None:
    if cls is torch.Size:
        return int if isinstance(index, int) else torch.Size
    return Tensor if cls is not None and issubclass(cls, Tensor) else None


@cache
def _is_annotated_tensor(forward: Callable[..., Any]) -> bool:
    return inspect.signature(forward).return_annotation in (Tensor, "Tensor")


def _is_torchs(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return any(getattr(module, name, None) is function for module in (torch, functional))


@cache
def _returned(name: str) -> type | None:
    """Return the class that all operations of this name return: `Tensor`, else None."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return None
    returned = [getattr(packet, overload)._schema.returns for overload in packet.overloads()]
    return Tensor if all(len(items) == 1 and str(items[0].type) == "Tensor" for items in returned) else None
