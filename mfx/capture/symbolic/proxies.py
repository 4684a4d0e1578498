"""Proxies for traced values, which record or refuse what a plain `torch.fx.Proxy` would lose."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx
from torch.fx.node import map_aggregate

from mfx import compat
from mfx.capture.symbolic.bytecode import (
    asserted,
    is_compared_with_truth,
    is_plain_access,
    is_text_for,
    unpacked_indices,
)
from mfx.capture.symbolic.call_values import UNKNOWN
from mfx.capture.symbolic.classes import ClassOfValue, OfTrace, class_of_item, is_class_check, known_class
from mfx.capture.symbolic.outputs import OUTPUTS
from mfx.capture.symbolic.refusals import OutputError, Refusals, UntraceableError

_INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")

_REFUSED = {  # special methods that Python calls, often in order to try something else if they fail
    "complex trunc floor ceil round": "the value of a traced tensor is needed as a number",
    "dlpack": "the value of a traced tensor is needed as an array",
    "contains": "a traced value is searched",
    "hash": "a traced value is looked up, which finds it by its identity, not by its value",
    "setitem delitem": "entries of a traced value are set, which a trace does not record",
    "divmod rdivmod": "a traced value is divided by divmod, which a trace does not record",
    "reduce_ex deepcopy copy": "a traced value is copied, which a trace does not record",
}


def apply_ufunc(name: str, *args: Any, **kwargs: Any) -> Any:
    """Apply a universal function of numpy, as a node of a graph."""
    import numpy

    return getattr(numpy, name)(*args, **kwargs)


if TYPE_CHECKING:
    from torch.fx import Proxy as _ProxyMethods
    from torch.fx.proxy import Attribute as _AttributeMethods
else:  # a model that asks if a value is a proxy gets the answer that it gets for a tensor
    _ProxyMethods, _AttributeMethods = map(compat.methods_of, (fx.Proxy, fx.proxy.Attribute))
    del _ProxyMethods.__call__  # callable() is False for a tensor


_OF_AUTOGRAD = ("grad", "grad_fn", "_base", "_version", "is_leaf", "retains_grad")


class _Proxy(ClassOfValue, _ProxyMethods):
    """A proxy on which ``x += y`` is recorded as a change of x in place, not as a new value."""

    as_proxy: type[fx.Proxy] = fx.Proxy
    tracer: Any = OfTrace()  # a SymbolicTracer
    node: Any = OfTrace()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tracer.iter(self))  # torch's own has a frame refer to itself

    def __len__(self) -> int:
        length = self.tracer.length_of(self)
        if length is None and unpacked_indices(sys._getframe(1)) is not None:
            raise TypeError("the length is told by the code")  # which list.extend takes for "not known"
        return self._refuse("the length of a traced value is not known") if length is None else int(length)

    def __index__(self) -> int:
        return operator.index(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.array(self._number(), *args, **kwargs)

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        import numpy

        given = map_aggregate(args, lambda arg: self.tracer.number_of(arg) if isinstance(arg, fx.Proxy) else arg)
        if not any(arg is UNKNOWN for arg in given):
            return getattr(ufunc, method)(*given, **kwargs)  # of sizes
        name = str(ufunc.__name__)
        if self.tracer.values is None or method != "__call__" or getattr(numpy, name, None) is not ufunc:
            self._refuse("numpy computes of the values of a traced tensor")
        return self.tracer.create_proxy("call_function", apply_ufunc, (name, *args), kwargs)

    def _number(self) -> Any:
        """Return a traced size as it is in the call that is traced."""
        value = self.tracer.number_of(self)
        return self._refuse("the value of a traced tensor is needed as a number") if value is UNKNOWN else value

    def __setattr__(self, name: str, value: Any) -> None:
        # Attributes of the model's own stay while it is traced; a tensor's attributes would change without a record.
        if hasattr(torch.Tensor, name):
            self._refuse(f"{name} of a traced value is set, which a trace does not record")
        object.__setattr__(self, name, value)

    def __bool__(self) -> bool:
        holds = asserted(sys._getframe(1))
        if holds is None:
            return bool(super().__bool__())
        condition = self if holds else self.tracer.create_proxy("call_function", operator.not_, (self,), {})
        self.tracer.create_proxy("call_function", torch._assert, (condition, "an assertion of the model failed"), {})
        return holds

    def __str__(self) -> str:
        return self._text(sys._getframe(1))

    def __repr__(self) -> str:
        return self._text(sys._getframe(1))

    def __format__(self, form: str) -> str:
        return self._text(sys._getframe(1), form)

    def _text(self, frame: FrameType, form: str | None = None) -> str:
        """Return the value as text; without a format as ``str`` writes it, which of a tensor is another text."""
        if (value := self.tracer.number_of(self)) is not UNKNOWN:
            return str(value) if form is None else format(value, form)
        if is_text_for(frame, ("_assert",)):
            return f"<{self.__dict__.get('attr') or self.node.name}>"
        if not is_text_for(frame, OUTPUTS):
            self.tracer.refusals.refuse(OutputError("a traced value is written as text, which a trace would do once"))
        return str(self.tracer.outputs.text_of(self, form))

    def class_of_value(self) -> type:
        """Return the class of the value."""
        found = known_class(self, self.tracer.root, self.tracer.values)
        return self._refuse("it depends on the class of a traced value, which is not known") if found is None else found

    def _refuse(self, what: str) -> NoReturn:
        refusals: Refusals = self.tracer.refusals
        refusals.refuse(UntraceableError(what))

    def __getattr__(self, name: str) -> Any:
        return self._attribute(name, sys._getframe(1))

    def _attribute(self, name: str, frame: FrameType) -> Any:
        if not hasattr(torch.Tensor, name):
            if name.startswith("__") or is_class_check(frame):
                raise AttributeError(name)
            if not is_plain_access(frame):
                if self.tracer.values is not None and self.tracer.values.lacks(self.node, name):
                    raise AttributeError(name)
                self._refuse(f"it depends on whether a traced value has an attribute {name}")
            if self._is_tensor():
                self._refuse(f"it depends on whether a traced value has an attribute {name}")
        elif name.startswith("__"):
            self._refuse(f"{name} of a traced value is read")
        elif name in _OF_AUTOGRAD:  # None or not, and other than at this place, in a graph that runs as one function
            self._refuse(f"{name} of a traced value is read, which autograd sets as the model runs")
        attribute = _Attribute(self, name)
        if name not in ("dtype", "device"):
            return attribute
        value = self.tracer.constant_of(attribute)
        return attribute if value is UNKNOWN else value

    def _is_tensor(self) -> bool:
        """True if the value is known to be a tensor: an argument, a parameter, a buffer."""
        node = self.__dict__.get("node")
        return node is not None and node.op in ("placeholder", "get_attr")


class _Attribute(_AttributeMethods, _Proxy):
    """``x.shape`` and the like."""

    as_proxy = fx.proxy.Attribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = super().__call__(*args, **kwargs)
        if self.attr != "item" or not is_compared_with_truth(sys._getframe(1)):
            return value
        if self.tracer.values is None:
            self._refuse("a number read off a tensor is compared with True or False itself")
        return self.tracer.to_bool(value) if class_of_item(value.node, self.tracer.values) is bool else value

    def __getattr__(self, name: str) -> Any:
        if self.attr == "shape" and not hasattr(torch.Size, name):  # numpy tries shape.prod
            raise AttributeError(f"torch.Size has no attribute {name}")
        return self._attribute(name, sys._getframe(1))


class Value(_Proxy):
    """The value of a node."""


def _record_inplace(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


def _refuse(name: str, what: str) -> Callable[..., NoReturn]:
    def method(self: _Proxy, *args: Any) -> NoReturn:
        self._refuse(what)

    method.__name__ = name
    return method


for _name in _INPLACE:
    setattr(_Proxy, f"__{_name}__", _record_inplace(_name))
for _names, _what in _REFUSED.items():
    for _name in _names.split():
        setattr(_Proxy, f"__{_name}__", _refuse(_name, _what))
