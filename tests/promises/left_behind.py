"""Models that note something in Python while they run: the kinds of places, and who writes there."""

from __future__ import annotations

import contextvars
import functools
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 8
LOG: list[Tensor] = []
TRACKER: dict[str, Any] = {}
COUNTS = {"calls": 0}
CALLS = 0
NOTED = contextvars.ContextVar[Any]("noted", default=None)
LOCAL = threading.local()
BY_MODULE: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


@dataclass
class Record:
    values: list[Tensor] = field(default_factory=list)
    calls: int = 0

    def note(self, y: Tensor) -> None:
        self.values.append(y)
        self.calls += 1


class Slots:
    __slots__ = ("calls", "last")

    def __init__(self) -> None:
        self.calls, self.last = 0, None


class Tally:
    """Somebody's counter for all models."""

    calls = 0


RECORD = Record()


def closure() -> tuple[Callable[[Tensor], None], Callable[[], Any]]:
    calls, values = 0, []

    def note(y: Tensor) -> None:
        nonlocal calls
        calls += 1
        values.append(y)

    return note, lambda: (calls, values)


CLOSURE_NOTE, CLOSURE_READ = closure()


def with_default(y: Tensor, values: list[Tensor] = []) -> list[Tensor]:  # noqa: B006
    values.append(y)
    return values


@functools.lru_cache
def cached(n: int) -> list[Tensor]:
    return []


# --- what a module does with a value, by the kind of place; state of the module's own, then of everybody's ------------


def to_list(self: Noting, y: Tensor) -> None:
    self.log.append(y)


def to_bounded_list(self: Noting, y: Tensor) -> None:
    self.log.append(y)
    if len(self.log) > 2:
        self.log.pop(0)


def to_deque(self: Noting, y: Tensor) -> None:
    self.recent.append(y)


def to_dict(self: Noting, y: Tensor) -> None:
    self.maps["y"] = y


def to_defaultdict(self: Noting, y: Tensor) -> None:
    self.lists["y"].append(y)


def to_counter(self: Noting, y: Tensor) -> None:
    self.counter["calls"] += 1


def to_ordered(self: Noting, y: Tensor) -> None:
    self.ordered[f"call {len(self.ordered)}"] = y


def to_set(self: Noting, y: Tensor) -> None:
    self.seen.add(len(self.seen))


def to_plain_list(self: Noting, y: Tensor) -> None:
    self.log.append(1)


def to_number(self: Noting, y: Tensor) -> None:
    self.calls += 1


def to_attribute(self: Noting, y: Tensor) -> None:
    self.last = y


def to_new_attribute(self: Noting, y: Tensor) -> None:
    self.found = y


def to_dataclass(self: Noting, y: Tensor) -> None:
    self.record.note(y)


def to_slots(self: Noting, y: Tensor) -> None:
    self.slots.calls += 1
    self.slots.last = y


def to_array(self: Noting, y: Tensor) -> None:
    self.array[0] += 1


def to_tensor(self: Noting, y: Tensor) -> None:
    self.plain[0].add_(1)


def to_nested(self: Noting, y: Tensor) -> None:
    self.nested["a"][0].append(y)


def to_outside_module(self: Noting, y: Tensor) -> None:
    self.outside[0].last = y


def to_parameter_list(self: Noting, y: Tensor) -> None:
    self.tensors.append(y)


OWN = [value for name, value in list(globals().items()) if name.startswith("to_")]


def to_global_list(self: Noting, y: Tensor) -> None:
    LOG.append(y)


def to_global_dict(self: Noting, y: Tensor) -> None:
    TRACKER["aux"] = TRACKER.get("aux", 0.0) + y


def to_global_count(self: Noting, y: Tensor) -> None:
    COUNTS["calls"] += 1


def to_global_number(self: Noting, y: Tensor) -> None:
    global CALLS
    CALLS += 1


def to_global_object(self: Noting, y: Tensor) -> None:
    RECORD.note(y)


def to_class(self: Noting, y: Tensor) -> None:
    Tally.calls += 1


def to_class_of_module(self: Noting, y: Tensor) -> None:
    type(self).total += 1


def to_closure(self: Noting, y: Tensor) -> None:
    CLOSURE_NOTE(y)


def to_default(self: Noting, y: Tensor) -> None:
    with_default(y)


def to_function(self: Noting, y: Tensor) -> None:
    with_default.last = y  # type: ignore[attr-defined]


def to_context_variable(self: Noting, y: Tensor) -> None:
    NOTED.set(y)


def to_thread_local(self: Noting, y: Tensor) -> None:
    LOCAL.last = y


def to_weak_dict(self: Noting, y: Tensor) -> None:
    BY_MODULE[self] = y


def to_cached(self: Noting, y: Tensor) -> None:
    cached(3).append(y)


SHARED = [value for name, value in list(globals().items()) if name.startswith("to_") and value not in OWN]


class Noting(nn.Module):
    total = 0

    def __init__(self, note: Callable[[Any, Tensor], None] | None) -> None:
        super().__init__()
        self.note = note
        self.log: list[Any] = []
        self.recent: deque[Tensor] = deque(maxlen=3)
        self.maps: dict[str, Tensor] = {}
        self.lists: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.counter: Counter[str] = Counter()
        self.ordered: OrderedDict[str, Tensor] = OrderedDict()
        self.seen: set[int] = set()
        self.calls = 0
        self.last: Tensor | None = None
        self.record, self.slots = Record(), Slots()
        self.array = np.zeros(2)
        self.plain = torch.zeros(2)
        self.nested: dict[str, list[list[Tensor]]] = {"a": [[]]}
        self.outside = [nn.Linear(1, 1)]
        self.tensors = nn.ParameterList()

    def takes_note_of(self, y: Tensor) -> None:
        if self.note is not None:
            self.note(self, y.mean())

    def noted(self) -> dict[str, Any]:
        """Return all that the module has noted so far."""
        own = {name: vars(self).get(name) for name in PLACES}
        return {**own, "tensors": list(self.tensors), "last outside": getattr(self.outside[0], "last", None)}


PLACES = [name for name in vars(Noting(None)) if name not in vars(nn.Module()) and name != "note"] + ["found"]


class Branch(Noting):
    def __init__(self, note: Any) -> None:
        super().__init__(note)
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc(self.norm(x)))
        self.takes_note_of(y)
        return y


class Block(Noting):
    def __init__(self, note: Any, inner: Any) -> None:
        super().__init__(note)
        self.branch, self.other = Branch(inner), Branch(None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(x)
        self.takes_note_of(x)
        return x + self.other(x)


class Net(Noting):
    """Blocks; what is noted is noted by branches, by blocks (which hold the sums), or by the whole."""

    def __init__(self, note: Any, by: str, depth: int = 3) -> None:
        super().__init__(note if by == "net" else None)
        who = [note if by == name else None for name in ("block", "branch")]
        self.blocks = nn.ModuleList(Block(*who) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        self.takes_note_of(x)
        return self.head(x)


def forget() -> None:
    """Have all that is everybody's as it was at first."""
    global CALLS
    CALLS = Tally.calls = 0
    for cls in (Noting, Branch, Block, Net):
        if "total" in vars(cls):
            cls.total = 0
    for each in (LOG, TRACKER, LOCAL.__dict__, BY_MODULE, with_default(torch.zeros(())), CLOSURE_READ()[1], cached(3)):
        each.clear()
    COUNTS["calls"] = RECORD.calls = 0
    RECORD.values.clear()
    with_default.__dict__.clear()
    NOTED.set(None)


def left(net: nn.Module) -> list[Any]:
    """Return all that a net, and everybody's places, hold: tensors and plain values, in order."""
    shared = [LOG, TRACKER, COUNTS, CALLS, RECORD, Tally.calls, Net.total, Block.total, Branch.total]
    shared += [CLOSURE_READ()[0] - BASE, CLOSURE_READ()[1], with_default.__defaults__, vars(with_default)]
    shared += [NOTED.get(), vars(LOCAL), list(BY_MODULE.values()), cached(3)]
    own = [m.noted() for m in net.modules() if isinstance(m, Noting)]
    return list(_flat([own, shared]))


BASE = 0


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        yield from (item for key in value for item in (key, *_flat(value[key])))
    elif isinstance(value, list | tuple | deque | set):
        yield len(value)
        yield from (leaf for item in value for leaf in _flat(item))
    elif isinstance(value, Record):
        yield from _flat([value.values, value.calls])
    elif isinstance(value, Slots):
        yield from _flat([value.calls, value.last])
    elif isinstance(value, np.ndarray):
        yield from value.tolist()
    elif isinstance(value, nn.Module) or callable(value):
        yield type(value).__name__
    else:
        yield value
