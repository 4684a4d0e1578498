"""A record of chains: their steps by path and kind, as a checkpoint carries it and graphs are compared by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfx_passes import paths
from mfx_passes.ir import Step, StepGraphs

Steps = tuple[tuple[str, str], ...]
Chains = Mapping[str, Sequence[Steps]]

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})  # not in checkpoints' keys


@dataclass(frozen=True)
class Record:
    """The chains of one or several graphs.

    Args:
        chains: the updates of each chain, path and kind, by the chain's name; several lists where calls with other
            arguments lead to other steps. None if the steps were not checked against shapes.
        traced: the same before that check, which may cost steps. None if there was no such time.
        computes: paths of all modules with a share in the graphs; None if these are all there is.
        beside: paths of the modules with a share in what lies in no chain; None if that is not known.
    """

    chains: Chains | None
    traced: Chains | None
    computes: frozenset[str] | None
    beside: frozenset[str] | None = None

    @property
    def known(self) -> Chains:
        """The chains, checked against shapes if there are such."""
        return self.traced or {} if self.chains is None else self.chains

    @classmethod
    def merged(cls, records: Iterable[Record]) -> Record | None:
        """Return the record of all graphs that some records are of; None without any."""
        records = list(records)
        if not records:
            return None
        return cls(
            _merged(record.chains for record in records),
            _merged(record.traced for record in records),
            _union([record.computes for record in records]),
            _union([record.beside for record in records]),
        )

    def differs(self, other: Record, moving: Collection[str], others_moving: Collection[str]) -> bool:
        """True if one of two records has a chain that the other has not, though it computes its steps.

        Args:
            other: the other record.
            moving: names of the chains of this one with γ > 0; what the others compute is the model.
            others_moving: those of the other one.
        """
        mine, theirs = self.comparable(other)
        if mine is None or theirs is None:
            return False  # steps may still be lost
        own, others = _all(mine), _all(theirs)
        repeated = {
            use for use in _alone(mine) & _alone(theirs) if not (self._has_beside(use) or other._has_beside(use))
        }
        unknown = (
            steps
            for name in moving
            for steps in mine.get(name, ())
            if steps not in others and _one_use(steps) not in repeated and other._computes_any(steps)
        )
        missing = (
            steps
            for name in others_moving
            for steps in theirs.get(name, ())
            if steps not in own and _one_use(steps) not in repeated and self._computes_any(steps)
            # or a call with other arguments led to these
            if not any(variant in others for variant in mine.get(name, ()))
        )
        return any(True for _ in (*unknown, *missing))

    def name_of(self, name: str, other: Record) -> str:
        """Return the name here of a chain of another record: that of a chain with the same steps, else its own."""
        mine, theirs = self.comparable(other)
        alike = (
            here
            for here, variants in (mine or {}).items()
            for steps in variants
            if steps in (theirs or {}).get(name, ())
        )
        return next(alike, name) if name not in (mine or {}) else name

    def comparable(self, other: Record) -> tuple[Chains | None, Chains | None]:
        """Return chains of this record and of another, in both with shapes or in both without."""
        if self.chains is not None and other.chains is not None:
            return self.chains, other.chains
        return self.traced, other.traced

    def _computes_any(self, steps: Steps) -> bool:
        return self.computes is None or any(path in self.computes for path, _ in steps)

    def _has_beside(self, steps: Steps) -> bool:
        """True if a step may run in no chain, too."""
        return self.beside is None or any(paths.is_inside(path, step) for step, _ in steps for path in self.beside)

    def to_metadata(self) -> dict[str, Any]:
        """Return the record as lists and dictionaries."""
        computes, beside = (None if found is None else sorted(found) for found in (self.computes, self.beside))
        return {
            "chains": _plain(self.chains),
            "traced": _plain(self.traced),
            "computes": computes,
            "beside": beside,
        }

    @classmethod
    def of_metadata(cls, data: Mapping[str, Any]) -> Record:
        """Return the record that `to_metadata` wrote."""
        sets = (data["computes"], data.get("beside"))  # the second is newer
        computes, beside = (None if found is None else frozenset(found) for found in sets)
        return cls(_of_plain(data["chains"]), _of_plain(data["traced"]), computes, beside)


def steps_of(steps: Iterable[Step | StepGraphs]) -> Steps:
    """Return path and kind of each update, without the wrappers that checkpoints say nothing about.

    The kind names the stream, if it is not the first one. What a chain computes depends on nothing else of its form.
    """
    return tuple(
        (unwrapped(path), kind if stream == 0 else f"{kind} of stream {stream}")
        for step in steps
        for path, kind, stream in _updates(step)
    )


def _updates(step: Step | StepGraphs) -> Iterable[tuple[str, str, int]]:
    if isinstance(step, Step):
        return [(update.path, update.kind, update.stream) for update in step.updates]
    return zip(step.paths or (step.path,), step.kinds, step.writes, strict=True)


def unwrapped(path: str) -> str:
    """Return a path without the modules that only wrap another one."""
    return paths.join(*(name for name in path.split(".") if name not in _WRAPPERS))


def _all(chains: Chains) -> set[Steps]:
    """Return the steps of all chains, once: a call may use a chain twice, and another one three times."""
    return {steps for variants in chains.values() for steps in variants}


def _alone(chains: Chains) -> set[Steps]:
    """Return the steps of one use of each chain that is the only one of its steps.

    Such a chain may be used n times in a row in one call, and m times in another. Of several, it would not be known
    whether what lies between two of them in one call lies there in the other.
    """
    uses = Counter(use for variants in chains.values() for use in set(map(_one_use, variants)))
    return {use for use, names in uses.items() if names == 1}


def _one_use(steps: Steps) -> Steps:
    """Return the steps of one use of a chain, of those of several uses in a row: the shortest part that they repeat.

    >>> _one_use((("a", "residual"), ("b", "residual"), ("a", "residual"), ("b", "residual")))
    (('a', 'residual'), ('b', 'residual'))
    """
    whole = len(steps)
    lengths = (n for n in range(1, whole + 1) if whole % n == 0)
    return next((steps[:n] for n in lengths if steps[:n] * (whole // n) == steps), ())


def _union(several: Sequence[frozenset[str] | None]) -> frozenset[str] | None:
    known = [found for found in several if found is not None]
    return frozenset().union(*known) if len(known) == len(several) else None


def _merged(several: Iterable[Chains | None]) -> Chains | None:
    merged: dict[str, list[Steps]] | None = None
    for chains in several:
        if chains is not None:
            merged = {} if merged is None else merged
            for name, variants in chains.items():
                known = merged.setdefault(name, [])
                known += [steps for steps in variants if steps not in known]
    return merged


def _plain(chains: Chains | None) -> Any:
    if chains is None:
        return None
    return {name: [[list(step) for step in steps] for steps in variants] for name, variants in chains.items()}


def _of_plain(data: Any) -> Chains | None:
    if data is None:
        return None
    return {
        name: [tuple((path, kind) for path, kind in steps) for steps in variants] for name, variants in data.items()
    }
