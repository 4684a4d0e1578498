"""Proxies for traced values, which record or refuse what a plain `torch.fx.Proxy` would lose."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mfx.capture.symbolic.bytecode import asserted
from mfx.capture.symbolic.call_values import UNKNOWN

_INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


class _Proxy(fx.Proxy):
    """A proxy on which ``x += y`` is recorded as a change of x in place, not as a new value."""

    tracer: Any  # a SymbolicTracer

    def __len__(self) -> int:
        length = self.tracer.length_of(self)
        if length is None:  # a TypeError, which list.extend takes for "not known"
            raise TypeError("the length of a traced value is not known")
        return int(length)

    def __index__(self) -> int:
        return operator.index(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.array(self._number(), *args, **kwargs)

    def __format__(self, form: str) -> str:
        value = self.tracer.number_of(self)
        return super().__format__(form) if value is UNKNOWN else format(value, form)

    def _number(self) -> Any:
        """Return a traced size as it is in the call that is traced."""
        value = self.tracer.number_of(self)
        if value is UNKNOWN:
            raise TypeError("the value of a traced tensor is needed as a number")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Attributes of the model's own stay while it is traced; a tensor's attributes would change without a record.
        if hasattr(torch.Tensor, name):
            raise TypeError(f"{name} of a traced value is set, which a trace does not record")
        object.__setattr__(self, name, value)

    def __bool__(self) -> bool:
        holds = asserted(sys._getframe(1))
        if holds is None:
            return bool(super().__bool__())
        condition = self if holds else self.tracer.create_proxy("call_function", operator.not_, (self,), {})
        self.tracer.create_proxy("call_function", torch._assert, (condition, "an assertion of the model failed"), {})
        return holds


class _Attribute(_Proxy, fx.proxy.Attribute):
    """``x.shape`` and the like."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        if self.attr == "shape" and not hasattr(torch.Size, name):  # numpy tries shape.prod
            raise AttributeError(f"torch.Size has no attribute {name}")
        return fx.proxy.Attribute(self, name)


class Value(_Proxy):
    """The value of a node."""

    def __getattr__(self, name: str) -> Any:
        attribute = _Attribute(self, name)
        if name not in ("dtype", "device"):
            return attribute
        value = self.tracer.constant_of(attribute)
        return attribute if value is UNKNOWN else value


def _record_inplace(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _INPLACE:
    setattr(_Proxy, f"__{_name}__", _record_inplace(_name))
