"""Containers from outside of a call, which TorchDynamo changes in other ways than Python does."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch._dynamo import side_effects
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import (  # type: ignore[attr-defined]  # SetVariable's module is not the same in all
    ConstantVariable,
    ConstDictVariable,
    SetVariable,
    VariableTracker,
    builder,
    lists,
    misc,
)


@contextmanager
def containers_as_in_python() -> Iterator[None]:
    """Within this context Dynamo knows that a deque is bounded, that keys have an order, and that ``-=`` takes away.

    Torch 2.14 forgets the ``maxlen`` of a deque (changing a bounded one, it then breaks the graph), and writes neither
    the order of an `OrderedDict` nor what was taken out of a set by ``-=`` back to the model's. Arrays of numpy that it
    does not trace it takes for constants, so that ``+=`` changed them while code was only converted, too. A dictionary
    that it writes back whole gets the keys of the first call, which it does not guard.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(builder.VariableBuilder, "_wrap", _wrap))
        stack.enter_context(patch.object(side_effects.SideEffects, "mutation", _mutation))
        stack.enter_context(patch.object(misc.NumpyVariable, "as_python_constant", _constant_of_numpy))
        yield


_original_wrap: Any = builder.VariableBuilder._wrap  # its parts, by type, are in a table that Dynamo makes once
_original_mutation: Any = side_effects.SideEffects.mutation
_original_constant_of_numpy: Any = misc.NumpyVariable.as_python_constant


def _wrap(self: Any, value: Any) -> Any:
    variable = _original_wrap(self, value)
    if type(value) is deque and isinstance(variable, lists.DequeVariable):
        install_guard(AttrSource(self.source, "maxlen").make_guard(GuardBuilder.EQUALS_MATCH))
        variable.maxlen = ConstantVariable.create(value.maxlen)
    return variable


def _mutation(self: Any, variable: Any) -> Any:
    if variable.source is not None:
        if isinstance(variable, SetVariable):
            variable.should_reconstruct_all = True
        elif _is_ordered(variable) or getattr(variable, "should_reconstruct_all", False):
            variable.should_reconstruct_all = True  # and so its keys are written as they were in this call
            self.output_graph_weakref().guard_on_key_order.add(variable.source)
            variable.install_dict_keys_match_guard()
    return _original_mutation(self, variable)


def _is_ordered(variable: Any) -> bool:
    return isinstance(variable, ConstDictVariable) and issubclass(variable.python_type(), OrderedDict)


def _constant_of_numpy(self: Any) -> Any:
    if isinstance(self.value, sys.modules["numpy"].ndarray):
        VariableTracker.as_python_constant(self)  # says that it is none
    return _original_constant_of_numpy(self)
