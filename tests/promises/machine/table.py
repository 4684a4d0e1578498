"""The table of actions: what people do, with which arguments, and which errors are expected."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.promises.machine.participant import Error, Participant


@dataclass(frozen=True)
class Refusal:
    """An error that a net may raise where its reference raises none.

    Attributes:
        reason: a change since the forward pass, as calls note it.
        message: of the error, a regular expression.
    """

    reason: str
    message: str

    def covers(self, found: Any, expected: Any, reasons: set[str]) -> bool:
        """True if this is why the results of a net and of its reference are not alike."""
        raises = isinstance(found, Error) and not isinstance(expected, Error)
        return raises and self.reason in reasons and bool(re.search(self.message, found.message))


@dataclass(frozen=True)
class Instead:
    """An error of the reference, in whose place a net may raise another one, or know what to do.

    Attributes:
        expected: of the reference's error, a regular expression.
        message: of the net's, likewise.
    """

    expected: str
    message: str

    def covers(self, found: Any, expected: Any, reasons: set[str]) -> bool:
        """True if this is why the results of a net and of its reference are not alike."""
        if not isinstance(expected, Error) or not re.search(self.expected, expected.message):
            return False
        return not isinstance(found, Error) or bool(re.search(self.message, found.message))


@dataclass(frozen=True)
class Action:
    """Something that people do with a model.

    Attributes:
        run: does it with a participant, and returns what is to be seen of it.
        choices: the values of its arguments, which JSON can hold.
        weight: how often it is drawn.
        accepts: True for drawn models that it is for.
        refusals: errors of nets alone.
    """

    run: Callable[..., Any]
    choices: Mapping[str, tuple[Any, ...]]
    weight: int
    accepts: Callable[[dict[str, Any]], bool]
    refusals: tuple[Refusal | Instead, ...]

    def __call__(self, participant: Participant, **arguments: Any) -> Any:
        """Do it."""
        return self.run(participant, **arguments)

    def draw(self, rng: Any) -> dict[str, Any]:
        """Draw arguments."""
        return {name: rng.choice(values) for name, values in self.choices.items()}


ACTIONS: dict[str, Action] = {}


def action(
    weight: int = 1,
    *,
    accepts: Callable[[dict[str, Any]], bool] = lambda spec: True,
    refusals: tuple[Refusal | Instead, ...] = (),
    **choices: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table of actions under its name."""

    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        ACTIONS[run.__name__] = Action(run, {k: tuple(v) for k, v in choices.items()}, weight, accepts, refusals)
        return run

    return enter
