"""What stands for a value while a model is traced: a proxy that notices what a plain one would lose, or freeze."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mfx.capture.symbolic.bytecode import asserted

_INPLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


class _Honest(fx.Proxy):
    """A proxy on which ``x += y`` is recorded as what it is: a change of x, not a new value."""

    def __len__(self) -> int:
        # A TypeError, because list.extend asks too, and takes it for "not known".
        raise TypeError("the length of a traced value is not known")

    def __setattr__(self, name: str, value: Any) -> None:
        # What a model notes on a tensor for itself is there while it is traced; what a tensor is would change unseen.
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


class _Attribute(_Honest, fx.proxy.Attribute):
    """``x.shape`` and the like."""


class Value(_Honest):
    """The value of a node."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


def _record_inplace(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _INPLACE:
    setattr(_Honest, f"__{_name}__", _record_inplace(_name))
