"""The chains that loaded weights were saved with, compared with those that a net has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from torch import nn

from mfx.options.options import Options
from mfx.program.record import Chains, Record, Steps, steps_of
from mfx.program.rewritten import RewrittenGraph
from mfx.text import count
from mfx_passes import MfxError
from mfx_passes.ir import Chain, Step


@dataclass(frozen=True)
class Loaded:
    """The chains that the weights of a net were saved with.

    Args:
        record: these chains.
        moving: names of those that had γ > 0.
    """

    record: Record
    moving: frozenset[str]

    def check(self, net: nn.Module, graph: RewrittenGraph, options: Options) -> None:
        """Check that a graph of the net computes the function that the weights were trained in, if both have γ > 0.

        Raises:
            MfxError: it has other chains.
        """
        if self.moving and graph.steady and graph.record.differs(self.record, graph.steady, self.moving):
            raise MfxError(f"{self.difference(net, graph.record)} {advice(net, graph, options, self.record)}")

    def difference(self, net: nn.Module, record: Record) -> str:
        """Return a sentence that says which chains the net has, and which the weights were saved with."""
        here, there = record.comparable(self.record)
        return (
            f"the weights given to this {type(net).__name__} were saved with other chains than it has, another "
            f"function of the same weights ({_listed(there or {})} there, {_listed(here or {})} here)."
        )


def _listed(chains: Chains) -> str:
    names = [f"{name} of {count(len(steps), 'step')}" for name in sorted(chains) for steps in chains[name]]
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])]) or "none"


def advice(net: nn.Module, graph: RewrittenGraph, options: Options, record: Record) -> str:
    """Return sentences that say how to have the chains of a record, found by trying."""
    _, there = graph.record.comparable(record)
    wanted = [steps for variants in (there or {}).values() for steps in variants]
    given = None if options.layers else _choice(partial(_find, net, graph, options), wanted, graph)
    if given is None:
        how = "No only=, skip= or min_steps= is known to give the old ones; make this net as the other one was made."
    else:
        arguments = "".join(f", {name}={value!r}" for name, value in given.items())
        how = (
            f"To have the old ones, call mfx.momentumize(model{arguments}) without any other only=, skip= and "
            "min_steps=, and with the other arguments as before."
        )
    return f"{how} load_state_dict(dict(state)) loads the weights without this check."


Choice = Mapping[str, Any]
Find = Callable[[Choice], list[Chain]]


def _find(net: nn.Module, graph: RewrittenGraph, options: Options, given: Choice) -> list[Chain]:
    try:
        return graph.findings(net, replace(options, **{"min_steps": 2, "only": None, "skip": None, **given})).chains
    except MfxError:
        return []  # a pattern fits nothing


def _choice(find: Find, wanted: Sequence[Steps], graph: RewrittenGraph) -> Choice | None:
    """Return arguments that choose the wanted chains, as far as the graph computes them; None if there are none."""
    inside = Counter(steps for steps in wanted if any(graph.computes(path) for path, _ in steps))
    tried = _choices(find, wanted)
    return next((given for given in tried if Counter(steps_of(chain.steps) for chain in find(given)) == inside), None)


def _choices(find: Find, wanted: Sequence[Steps]) -> Iterator[Choice]:
    least = min(map(len, wanted))
    base: Choice = {} if least > 1 else {"min_steps": 1}
    yield base
    yield {"min_steps": least}
    found = find(base)
    rows = [_located(steps, found) for steps in wanted]
    kept = {step for row in rows for step in row}
    left_out = [chain.name for chain in found if kept.isdisjoint(chain.steps)]
    yield {**base, "skip": left_out}
    yield {**base, "only": [chain.name for chain in found if chain.steps in rows]}
    yield {
        **base,
        "skip": _distinct(u.path for chain in found for step in chain.steps if step not in kept for u in step.updates),
    }
    groups = [_distinct(path for path, _ in steps) for steps in wanted]
    yield {**base, "only": _distinct(path for group in groups for path in group)}
    yield {**base, "only": groups}
    yield {**base, "only": [_names(row) or group for row, group in zip(rows, groups, strict=True)]}


def _located(steps: Steps, found: Sequence[Chain]) -> list[Step]:
    """Return the steps in a row that are those of a record, an empty list if none are or several may be."""
    rows = [row for chain in found for row in _rows(chain.steps, len(steps))]
    alike = [row for row in rows if steps_of(row) == steps]
    return alike[0] if len(alike) == 1 else []


def _rows(steps: Sequence[Step], updates: int) -> Iterator[list[Step]]:
    """Yield the steps in a row that make up so many updates."""
    before = list(accumulate((len(step.updates) for step in steps), initial=0))
    ends = {count: i for i, count in enumerate(before)}
    return ([*steps[i : ends[count + updates]]] for i, count in enumerate(before) if count + updates in ends)


def _names(row: Sequence[Step]) -> list[str]:
    return [update.name for step in row for update in step.updates]


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
