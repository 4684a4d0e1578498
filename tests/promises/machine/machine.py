"""The machine: participants that the same actions go through, compared after every one of them."""

import json
from collections import Counter
from typing import Any

from tests.promises.machine import actions
from tests.promises.machine.compare import Difference, differences, modes, observe
from tests.promises.machine.participant import GROUPS, Error, participants
from tests.promises.machine.table import ACTIONS

assert actions.calls  # which have filled the table

Step = tuple[str, dict[str, Any]]


class NotAlikeError(AssertionError):
    """A net that is not like its reference.

    Attributes:
        name: of the action after which it is not.
        net: who is not.
        differences: where.
        sequence: the drawn model and the actions, to be replayed.
    """

    def __init__(self, name: str, net: str, found: list[Difference], sequence: dict[str, Any]) -> None:
        self.name, self.net, self.differences, self.sequence = name, net, found, sequence
        shown = "\n  ".join(str(difference)[:600] for difference in found[:6])
        super().__init__(
            f"after {name}, {net} is not like its reference in {len(found)} places:\n  {shown}\n"
            f"replay: {json.dumps(sequence)}"
        )

    @property
    def kind(self) -> str:
        """The kind of the first difference."""
        return self.differences[0].kind


class Machine:
    """A plain model and its nets.

    Args:
        spec: the drawn model.

    Attributes:
        steps: the actions so far.
        errors: how many of them ended in an error that was expected.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.participants = participants(spec)
        self.steps: list[Step] = []
        self.errors: Counter[str] = Counter()

    def do(self, name: str, arguments: dict[str, Any]) -> None:
        """Let every participant do the same, and compare.

        Raises:
            NotAlikeError: a net is not like its reference.
        """
        self.steps.append((name, arguments))
        if arguments.get("waiting") is False:
            self._do("finish", {})
        self._do(name, arguments)

    def _do(self, name: str, arguments: dict[str, Any]) -> None:
        outside = modes()
        results, seen = {}, {}
        for key, participant in self.participants.items():
            participant.reasons = set()
            results[key] = participant.apply(ACTIONS[name], arguments)
        failed = any(isinstance(result, Error) for result in results.values())
        if failed:
            for participant in self.participants.values():
                participant.forget()
        for key, participant in self.participants.items():
            seen[key] = observe(participant, results[key])
        for reference, nets in GROUPS.items():
            for net in nets:
                self._compare(name, net, reference, results, seen)
        if failed:
            self.errors[name] += 1
        assert modes() == outside, f"{name} left modes behind: {modes()} instead of {outside}"

    def _compare(self, name: str, net: str, reference: str, results: Any, seen: Any) -> None:
        found = differences(seen[net], seen[reference])
        covers = (
            r.covers(results[net], results[reference], self.participants[net].reasons) for r in ACTIONS[name].refusals
        )
        if found and found[0].kind == "result" and any(covers):
            found = found[1:]
        if found:
            raise NotAlikeError(name, net, found, self.sequence)

    @property
    def sequence(self) -> dict[str, Any]:
        """The drawn model and the actions, as JSON can hold them."""
        return {"model": self.spec, "steps": [list(step) for step in self.steps]}


def replay(sequence: dict[str, Any]) -> Machine:
    """Run a sequence from a file.

    Raises:
        NotAlikeError: a net is not like its reference.
    """
    machine = Machine(sequence["model"])
    for name, arguments in sequence["steps"]:
        machine.do(name, arguments)
    return machine


def weighted(spec: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return the names of the actions that a drawn model accepts, and how often each is drawn."""
    accepted = {name: action.weight for name, action in ACTIONS.items() if action.accepts(spec)}
    return list(accepted), list(accepted.values())


def outcome(sequence: dict[str, Any]) -> NotAlikeError | None:
    """Return what a sequence finds, None if nothing."""
    try:
        replay(sequence)
    except NotAlikeError as found:
        return found
    return None
