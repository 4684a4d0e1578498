"""Decisions of a model on the values of tensors: a trace follows one path, and its graph checks that it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mfx import compat
from mfx.modules.recomputing import RUNNING
from mfx_passes import MfxError
from mfx_passes.rewrite.fold import stays_in_graph

Place = tuple[str, int]


class MispredictedError(MfxError):
    """A condition has another value than the one that the running graph was traced for.

    Attributes:
        number: the position of the decision among those of the graph.
        value: the value that the condition has.
    """

    def __init__(self, number: int, value: bool, line: str) -> None:
        super().__init__(
            f"a condition came out as {value} in a graph that is for {not value} ({line}). Call the net itself, which "
            "has a graph for each."
        )
        self.number, self.value = number, value


@dataclass(frozen=True)
class Decision:
    """One condition that a trace met, and the value that it took for it.

    Args:
        path: the path of the module whose code decides.
        line: the line of the code.
        instruction: the offset of the deciding instruction in its function's bytecode.
        value: the value.
    """

    path: str
    line: str
    instruction: int
    value: bool

    @property
    def place(self) -> Place:
        """Equal for decisions that one instruction takes, in whatever module."""
        return self.line, self.instruction

    def is_same_condition(self, other: Decision) -> bool:
        """True if another decision is on the same condition, whatever its value."""
        return (self.path, self.place) == (other.path, other.place)


@stays_in_graph
def check_decision(condition: Any, value: bool, number: int, line: str) -> None:
    """Check, as a node of a graph, that a condition has the value that the graph was traced for.

    A recomputation, whose values are checked by themselves, does not wait for the device again.

    Raises:
        MispredictedError: it has the other one.
    """
    if (
        RUNNING.again
        or compat.is_fake(condition)
        or isinstance(condition, torch.SymBool | torch.SymInt | torch.SymFloat)
    ):
        return  # it has none that counts
    if bool(condition) is not value:
        raise MispredictedError(number, not value, line)


def diverge(one: Sequence[Decision], other: Sequence[Decision]) -> bool:
    """True if two paths part at a condition that both have met, so that no inputs take both of them."""
    for mine, theirs in zip(one, other, strict=False):
        if not mine.is_same_condition(theirs):
            return False
        if mine.value is not theirs.value:
            return True
    return False


class Guesses:
    """The values that the traces of one capture take for the conditions that they meet.

    Args:
        told: the first decisions, as a call has told them.
        hints: decisions of another path; where nothing is told, the values are those at the same place there.
    """

    LIMIT = 64  # conditions in one path

    def __init__(self, told: Sequence[Decision] = (), hints: Sequence[Decision] = ()) -> None:
        self._told = len(told)
        self._known = [decision.value for decision in told]
        self._hints: defaultdict[Place, list[bool]] = defaultdict(list)
        for decision in hints or told:
            self._hints[decision.place].append(decision.value)

    def decide(self, before: Sequence[Decision], path: str, line: str, instruction: int) -> Decision:
        """Return the decision that follows on those ``before``."""
        place = line, instruction
        if len(before) < len(self._known):
            return Decision(path, *place, self._known[len(before)])
        hints = self._hints.get(place, [False])
        count = sum(decision.place == place for decision in before)
        return Decision(path, *place, hints[min(count, len(hints) - 1)])

    def are_told(self, decisions: Sequence[Decision]) -> bool:
        """True if all these decisions are those of a call."""
        return 0 < len(decisions) <= self._told

    def may_err(self, decisions: Sequence[Decision]) -> bool:
        """True if an error on this path may come of a guess: of its last decision, or of a loop without end."""
        return len(decisions) > len(self._known) if len(decisions) < self.LIMIT else bool(self._hints)

    def change(self, decisions: Sequence[Decision]) -> None:
        """Choose other values for the next trace, after one on this path that may err."""
        if len(decisions) == self.LIMIT:
            self._hints.clear()
        else:
            self._known = [*(decision.value for decision in decisions[:-1]), not decisions[-1].value]
