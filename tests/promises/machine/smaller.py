"""Make a sequence that finds something smaller: fewer actions, fewer steps, fewer layers, plainer arguments."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.promises.machine.table import ACTIONS

Sequence = dict[str, Any]


def smaller(sequence: Sequence, finds: Callable[[Sequence], bool], seconds: float) -> Sequence:
    """Return a sequence that still finds the same, from which hardly anything can be left out.

    Args:
        sequence: the model and the actions.
        finds: True for sequences that do.
        seconds: how long may be tried.
    """
    end = time.monotonic() + seconds
    again = True
    while again:
        again = False
        for candidate in candidates(sequence):
            if time.monotonic() > end:
                return sequence
            if finds(candidate):
                sequence, again = candidate, True
                break
    return sequence


def candidates(sequence: Sequence) -> Iterator[Sequence]:
    """Yield sequences that are a little smaller, those that are much smaller first."""
    yield from _with_fewer_actions(sequence)
    for chains in _smaller_lists(sequence["model"]["chains"], least=1):
        yield _with_model(sequence, chains=chains)
    for number, chain in enumerate(sequence["model"]["chains"]):
        for other in _smaller_chains(chain):
            chains = [*sequence["model"]["chains"]]
            chains[number] = other
            yield _with_model(sequence, chains=chains)
    if sequence["model"]["options"]["recompute"]:
        yield _with_model(sequence, options={**sequence["model"]["options"], "recompute": None})
    if sequence["model"]["kind"] != "model":
        yield _with_model(sequence, kind="model")
    yield from _with_plainer_arguments(sequence)


def _with_fewer_actions(sequence: Sequence) -> Iterator[Sequence]:
    steps = sequence["steps"]
    count = len(steps) // 2
    while count:
        for start in range(0, len(steps) - 1, count):
            if start + count < len(steps):  # what finds it is the last one
                yield {**sequence, "steps": steps[:start] + steps[start + count :]}
        count //= 2


def _with_model(sequence: Sequence, **changed: Any) -> Sequence:
    return {**sequence, "model": {**sequence["model"], **changed}}


def _smaller_lists(items: list[Any], least: int) -> Iterator[list[Any]]:
    if len(items) > 2 * least:
        yield items[:least]
    if len(items) > least:
        for index in range(len(items)):
            yield items[:index] + items[index + 1 :]


def _smaller_chains(chain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for steps in _smaller_lists(chain["steps"], least=2):
        yield {**chain, "steps": steps}
    if chain["tail"] != "none":
        yield {**chain, "tail": "none"}
    for index, step in enumerate(chain["steps"]):
        if isinstance(step, dict):
            others: list[Any] = [["linear"], *_smaller_chains(step)]
        else:
            others = list(_smaller_lists(step, least=1))
        for other in others:
            steps = copy.copy(chain["steps"])
            steps[index] = other
            yield {**chain, "steps": steps}


def _with_plainer_arguments(sequence: Sequence) -> Iterator[Sequence]:
    for index, (name, arguments) in enumerate(sequence["steps"]):
        for key, value in arguments.items():
            plainest = ACTIONS[name].choices[key][0]
            if value != plainest:
                steps = copy.copy(sequence["steps"])
                steps[index] = [name, {**arguments, key: plainest}]
                yield {**sequence, "steps": steps}
