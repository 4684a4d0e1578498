"""The path that a trace takes through a model: the conditions on tensors that it has met, and their guessed values."""

from __future__ import annotations

from mfx.capture.decisions import Decision, Guesses
from mfx.capture.symbolic.refusals import DECISION, Refusals, UntraceableError, WrongGuessError
from mfx.capture.symbolic.user_code import is_raised_by_user, line_of, users_frame


class PathTaken:
    """The decisions of one trace.

    Args:
        guesses: the values to take for conditions; None if the trace is to refuse these.
        refusals: takes the refusal.

    Attributes:
        decisions: the conditions that were met, in order.
    """

    def __init__(self, guesses: Guesses | None, refusals: Refusals) -> None:
        self.decisions: list[Decision] = []
        self._guesses, self._refusals = guesses, refusals

    def decide(self, within: str) -> Decision:
        """Return the decision on the condition that the user's code meets now, in the module at a path."""
        guesses, number = self._guesses, len(self.decisions)
        if guesses is None:
            self._refusals.refuse(UntraceableError(DECISION))
        if number == guesses.LIMIT:
            self._refusals.refuse(UntraceableError(f"more than {number} decisions depend on the values of tensors"))
        frame = users_frame()
        decision = guesses.decide(self.decisions, within, line_of(frame), frame.f_lasti)
        self.decisions.append(decision)
        return decision

    def is_misled_by(self, error: BaseException, decided: int = 0) -> bool:
        """True if an error comes of guesses, those behind the first ``decided`` ones; others may do without it."""
        if self._guesses is None or len(self.decisions) <= decided or not self._guesses.may_err(self.decisions):
            return False
        at_limit = len(self.decisions) == self._guesses.LIMIT
        return at_limit or isinstance(error, WrongGuessError) or is_raised_by_user(error)
