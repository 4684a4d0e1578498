"""A long run: models and actions drawn at random, failures classified, made small and kept.

python -m tests.promises.machine.drive --minutes 60 --keep DIRECTORY [--dynamo] [--seed N]
"""

import argparse
import hashlib
import json
import random
import re
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.promises.machine import models
from tests.promises.machine.compare import Difference
from tests.promises.machine.machine import Machine, NotAlikeError, outcome, weighted
from tests.promises.machine.smaller import smaller
from tests.promises.machine.table import ACTIONS

LENGTH = 16  # actions per model


@dataclass
class Run:
    """The result of a run.

    Attributes:
        models: how many were drawn.
        actions: how often each was done.
        errors: how often each ended in an error that was expected.
        found: how often failures of each class came up.
        sequences: one of each class.
    """

    models: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    sequences: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def share_of_errors(self) -> float:
        """The share of actions that ended in an error."""
        return sum(self.errors.values()) / max(1, sum(self.actions.values()))

    def __str__(self) -> str:
        share = f"{100 * self.share_of_errors:.2f} % errors {dict(self.errors)}"
        lines = [f"{self.models} models, {sum(self.actions.values())} actions, {share}"]
        return "\n".join([*lines, *(f"{count:6} {name}" for name, count in self.found.most_common())])


def kind_of(found: NotAlikeError) -> str:
    """Return the class of a failure: after which action, who, and what differs, without numbers and names."""
    first = found.differences[0]
    arguments = found.sequence["steps"][-1][1] if found.name == found.sequence["steps"][-1][0] else {}
    action = " ".join([found.name, *(str(arguments[key]) for key in ("under", "kind") if key in arguments)])
    place = re.sub(r"\d+|.*\.", "", first.path)
    return " | ".join((action, found.net.split("_")[0], first.kind, place, _words(first)))


def _words(first: Difference) -> str:
    """Return what an error or a warning says, without numbers and paths."""
    said = next((value for value in (first.found, first.expected) if isinstance(value, str) and ": " in value), "")
    said = str(first.found or first.expected) if first.kind == "warning" else said
    if not said:
        return "FakeTensor" if "FakeTensor" in str(first.found) else "values"
    return re.sub(r"[\w.]*\.\d[\w.]*|\d+", "#", said)[:110]


def drive(run: Run, seed: int, *, symbolic: bool) -> tuple[str, dict[str, Any]] | None:
    """Draw a model and do things with it; return the class and the sequence of what is found, None if nothing."""
    rng = random.Random(seed)
    machine = Machine(models.draw(rng, symbolic=symbolic))
    run.models += 1
    names, weights = weighted(machine.spec)
    try:
        for _ in range(LENGTH):
            (name,) = rng.choices(names, weights)
            run.actions[name] += 1
            machine.do(name, ACTIONS[name].draw(rng))
    except NotAlikeError as found:
        run.found[kind_of(found)] += 1
        return kind_of(found), found.sequence
    finally:
        run.errors += machine.errors
    return None


def long_run(minutes: float, seed: int, keep: Path | None, *, symbolic: bool = True) -> Run:
    """Draw one model after the other until the time is up.

    Args:
        minutes: the time.
        seed: of the first model.
        keep: where a sequence of each class is written to; None to keep none.
        symbolic: draw models that can be traced symbolically, nearly always.
    """
    run, end = Run(), time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        try:
            one = drive(run, seed, symbolic=symbolic)
        except Exception:
            print(f"seed {seed} broke the machine\n{traceback.format_exc()}", flush=True)
            one = None
        seed += 1
        if one is not None and one[0] not in run.sequences:
            run.sequences[one[0]] = _kept(*one, keep)
        if run.models % 20 == 0:
            print(f"{time.strftime('%H:%M:%S')} seed {seed}: {run}\n", flush=True)
    return run


def _kept(kind: str, sequence: dict[str, Any], keep: Path | None) -> dict[str, Any]:
    print(f"{time.strftime('%H:%M:%S')} new: {kind}", flush=True)
    if keep is None:
        return sequence
    small = smaller(sequence, lambda one: (found := outcome(one)) is not None and kind_of(found) == kind, seconds=8)
    name = hashlib.sha1(kind.encode()).hexdigest()[:8]
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f"{name}.json").write_text(json.dumps({"found": kind, **small}, indent=1))
    print(f"    {name}: {json.dumps(small)}", flush=True)
    return small


def main() -> None:
    """Run as told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--dynamo", action="store_true")
    parser.add_argument("--replay", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if chosen.replay is not None:
        print(outcome(json.loads(chosen.replay.read_text())) or "nothing found")
        return
    print(long_run(chosen.minutes, chosen.seed, chosen.keep, symbolic=not chosen.dynamo))


if __name__ == "__main__":
    main()
