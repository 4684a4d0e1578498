"""A graph break in a loop, where TorchDynamo runs the whole function as written: it keeps the stretch before the loop.

Reads how Dynamo goes back to the last line from which it can go on (read in torch 2.14; others are left as they are).
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.exc import unimplemented
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables import ConstantVariable, TensorVariable
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import SymNodeVariable

_KNOWN = (TensorVariable, ConstantVariable, SymNodeVariable, BaseListVariable)
_PLAIN = (torch.Tensor, bool, int, float, str, type(None))


@contextmanager
def stretches_before_loops_kept() -> Iterator[None]:
    """Within this context, the stretch before a loop with a graph break is a graph, and what follows runs as written.

    Only where what follows holds no step of a chain: it adds nothing, and no variable that it reads holds a module.
    """
    skip = getattr(InstructionTranslatorBase, "raise_loop_graph_break", None)
    if skip is None:
        yield
        return
    breaks: dict[CodeType, Any] = {}
    step = InstructionTranslatorBase.step_graph_break

    def go_back(code: CodeType, error: Any) -> None:
        breaks[code] = error
        unimplemented(gb_type="graph break in loop", context="", explanation="", hints=[], from_exc=error)

    def step_unless_steps_follow(self: Any, following: Any) -> None:
        if self.f_code in breaks and _may_hold_steps(self, following):
            skip(self.f_code, breaks[self.f_code])
        step(self, following)

    with (
        patch.object(InstructionTranslatorBase, "raise_loop_graph_break", staticmethod(go_back)),
        patch.object(InstructionTranslatorBase, "step_graph_break", step_unless_steps_follow),
    ):
        yield


def _may_hold_steps(translator: Any, following: Any) -> bool:
    """True if the code from an instruction on, and from where it jumps back to, may add up steps or call modules."""
    instructions, known = translator.instructions, translator.symbolic_locals
    start = translator.indexof[following]
    jumps = [translator.indexof[each.target] for each in instructions[start:] if each.target is not None]
    return any(_may_be_of_step(each, known, translator.f_globals) for each in instructions[min([start, *jumps]) :])


def _may_be_of_step(instruction: Any, known: Any, variables: Any) -> bool:
    name, value = instruction.opname, instruction.argval
    if isinstance(value, CodeType):
        return any(_may_be_of_step(inner, {}, variables) for inner in dis.get_instructions(value))
    if name == "BINARY_OP":
        return dis._nb_ops[instruction.arg][1] in ("+", "+=")  # type: ignore[attr-defined]
    if name in ("LOAD_CLOSURE", "LOAD_DEREF", "LOAD_CLASSDEREF"):
        return True
    if "_FAST" in name:
        names = value if isinstance(value, tuple) else (value,)
        return any(each in known and not _holds_no_module(known[each]) for each in names)
    return value in ("add", "add_") or (name == "LOAD_GLOBAL" and isinstance(variables.get(value), nn.Module))


def _holds_no_module(variable: VariableTracker) -> bool:
    found: list[bool] = []

    def look(inner: VariableTracker) -> None:
        is_lazy = isinstance(inner, LazyVariableTracker)
        found.append(type(inner.peek_value()) in _PLAIN if is_lazy else isinstance(inner, _KNOWN))  # type: ignore[attr-defined]

    VariableTracker.visit(look, variable)
    return all(found)
