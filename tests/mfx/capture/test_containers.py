"""Containers of a model's own that its forward changes outside of the chains: at γ = 0 as the model does."""

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from operator import iadd, imul, ior, isub

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfx

WIDTH = 2


class Model(nn.Module):
    """Changes what it holds, and adds what that gives to its result."""

    def __init__(self, held, change):
        super().__init__()
        torch.manual_seed(0)
        self.held, self.change = held, change
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))

    def forward(self, x):
        given = self.change(self.held, x.mean().detach())
        for block in self.blocks:
            x = x + block(x)
        return x if given is None else x + given


def tensors(*values):
    return [torch.tensor(float(value)) for value in values]


def replaced(h, m):
    old = h["a"]
    h["a"] = m
    return old


def oldest_replaced(h, m):
    key, value = h.popitem(last=False)
    h[key] = m
    return value


def least_recent(h, m):
    key = next(iter(h))
    h.move_to_end(key)
    return h[key]


def evicted(h, m):
    h[len(h) + sum(map(int, h))] = m
    if len(h) > 2:
        h.popitem(last=False)
    return sum(h.values())


def taken_away(h, m):
    h -= {1}
    return float(sum(h))


class Recent(OrderedDict):
    pass


class Window(deque):
    pass


class Numbers(np.ndarray):
    pass


HELD = {
    "bounded deque": lambda: deque(tensors(1, 2, 3), maxlen=3),
    "bounded deque that fills": lambda: deque(tensors(1, 2), maxlen=3),
    "deque": lambda: deque(tensors(1, 2, 3)),
    "deque of a class": lambda: Window(tensors(1, 2, 3), maxlen=3),
    "list": lambda: tensors(1, 2, 3),
    "dictionary": lambda: dict(zip("abc", tensors(1, 2, 3), strict=True)),
    "ordered": lambda: OrderedDict(zip("abc", tensors(1, 2, 3), strict=True)),
    "ordered of a class": lambda: Recent(zip("abc", tensors(1, 2, 3), strict=True)),
    "default": lambda: defaultdict(list, a=tensors(1)),
    "counter": lambda: Counter(a=2, b=1),
    "set": lambda: {1, 2, 3},
    "set of tensors": lambda: set(tensors(1)),
    "array": lambda: np.ones(3),
    "array of integers": lambda: np.arange(3),
    "array of a class": lambda: np.ones(3).view(Numbers),
    "array of objects": lambda: np.array([1.0, 2.0], dtype=object),
}
OF_SEQUENCES = {
    "append": lambda h, m: (h.append(m), sum(h))[1],
    "only append": lambda h, m: h.append(m),
    "extend": lambda h, m: (h.extend([m, 2 * m]), sum(h))[1],
    "set": lambda h, m: h.__setitem__(0, m),
    "reverse": lambda h, m: (h.reverse(), h[0])[1],
    "clear": lambda h, m: (h.clear(), h.append(m), h[0])[2],
    "length": lambda h, m: (h.append(m), len(h))[1],
    "last out": lambda h, m: (h.pop(), h.insert(1, m))[0],
    "swap": lambda h, m: (h.__setitem__(0, h[1]), h.__setitem__(1, m), h[0])[2],
    "in place": lambda h, m: h.__iadd__([m]) and None,
}
OF_DEQUES = {
    "append left": lambda h, m: (h.appendleft(m), sum(h))[1],
    "extend left": lambda h, m: (h.extendleft([m, 2 * m]), h[0])[1],
    "pop left": lambda h, m: (h.popleft(), h.append(m))[0],
    "rotate": lambda h, m: (h.rotate(1), h[0])[1],
    "longest": lambda h, m: h.maxlen or 0,
}
OF_LISTS = {
    "first out": lambda h, m: (h.pop(0), h.append(m))[0],
    "insert": lambda h, m: (h.insert(0, m), h.pop())[1],
    "slice": lambda h, m: h.__setitem__(slice(0, 2), [m, 2 * m]),
    "drop": lambda h, m: (h.append(m), h.__delitem__(slice(None, -2)), h[0])[2],
}
OF_DICTIONARIES = {
    "replaced": replaced,
    "pop and set": lambda h, m: (h.pop("a"), h.__setitem__("a", m))[0],
    "first key": lambda h, m: (k := next(iter(h)), h.pop(k), h.__setitem__(k, m))[1],
    "update": lambda h, m: (h.update({"a": m, "r": 2 * m}), sum(h.values()))[1],
    "mean": lambda h, m: (h.__setitem__("a", h["a"] * 0.5 + m), h["a"])[1],
    "clear": lambda h, m: (h.clear(), h.__setitem__("k", m))[1],
    "last replaced": lambda h, m: (h.popitem(), h.__setitem__("k", m))[0][1],
    "one fewer": lambda h, m: h.popitem()[1] if h else h.update({"a": m, "b": 2 * m}),
    "union": lambda h, m: (ior(h, {len(h): m}), sum(h.values()))[1],
}
OF_ARRAYS = {
    "add": lambda h, m: float(iadd(h, 1).sum()),
    "times": lambda h, m: float(imul(h, 2)[0]),
    "less": lambda h, m: isub(h, 1) is None,
    "entry": lambda h, m: h.__setitem__(0, h[1] + 1),
    "method": lambda h, m: (h.fill(h[0] + 1), float(h[0]))[1],
}
OF_ORDERED = {
    "oldest replaced": oldest_replaced,
    "least recent": least_recent,
    "to the front": lambda h, m: h.move_to_end(next(reversed(h)), last=False),
    "last": lambda h, m: (item := h.popitem(), h.__setitem__(item[0], m))[0][1],
}
CHANGES = {
    **dict.fromkeys(
        ("bounded deque", "bounded deque that fills", "deque", "deque of a class"), OF_SEQUENCES | OF_DEQUES
    ),
    "list": OF_SEQUENCES | OF_LISTS,
    "dictionary": OF_DICTIONARIES,
    **dict.fromkeys(("ordered", "ordered of a class"), OF_DICTIONARIES | OF_ORDERED),
    "default": {
        "append": lambda h, m: h["a"].append(m),
        "window": lambda h, m: (h["a"].append(m), h["a"].pop(0))[1],
        "new": lambda h, m: (h["b"].append(m), sum(h["b"]))[1],
    },
    "counter": {"count": lambda h, m: (h.update(["a"]), h["a"])[1], "subtract": lambda h, m: h.subtract({"a": 1})},
    "set": {"add": lambda h, m: (h.add(len(h) + 1), float(len(h)))[1], "take away": taken_away},
    "set of tensors": {"replace": lambda h, m: (h.pop(), h.add(m))[0]},
    **dict.fromkeys(("array", "array of integers", "array of a class", "array of objects"), OF_ARRAYS),
}
CASES = [pytest.param(HELD[h], f, id=f"{h}: {name}") for h, changes in CHANGES.items() for name, f in changes.items()]
QUICK = [
    (HELD["bounded deque"], OF_SEQUENCES["append"]),
    (HELD["bounded deque"], OF_DEQUES["rotate"]),
    (HELD["list"], OF_LISTS["first out"]),
    (HELD["dictionary"], replaced),
    (HELD["ordered"], oldest_replaced),
    (HELD["ordered"], least_recent),
    (HELD["set"], taken_away),
    (HELD["dictionary"], OF_DICTIONARIES["last replaced"]),
    (HELD["dictionary"], OF_DICTIONARIES["one fewer"]),
    (HELD["array"], OF_ARRAYS["add"]),
    (HELD["array of a class"], OF_ARRAYS["times"]),
]


def contents(value):
    if isinstance(value, Tensor):
        return value.item()  # an error for a tensor without a value
    if isinstance(value, dict):
        return [(key, contents(entry)) for key, entry in value.items()]
    if isinstance(value, set):
        return sorted(map(contents, value))
    return list(map(contents, value)) if isinstance(value, list | deque | np.ndarray) else value


def check(held, change, capture="auto"):
    model = Model(held(), change)
    plain = copy.deepcopy(model)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    for call in range(4):
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(call))
        assert torch.equal(net(x), plain(x)), call
        assert contents(net.held) == contents(plain.held), call
        assert type(net.held) is type(plain.held)
        if call == 1 and isinstance(plain.held, Counter | list):  # the user changes them, too
            for held in (net.held, plain.held):
                held.update({"a": 5}) if isinstance(held, Counter) else held.append(torch.tensor(9.0))


@pytest.mark.filterwarnings("ignore::UserWarning")  # where nothing is left to rewrite
@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("held, change", QUICK)
def test_they_change_as_in_the_model(held, change, capture):
    check(held, change, capture)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("held, change", CASES)
def test_every_change_of_every_container(held, change, capture):
    check(held, change, capture)


class Printing(nn.Module):
    """Can be captured by nothing; what it does at its first call only is no accumulation."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.calls, self.log, self.table, self.ready, self.on = [0], [], {}, False, False

    def forward(self, x):
        if not self.ready:
            self.ready, self.table["width"] = True, WIDTH
        self.calls[0] += 1
        self.log.append("call")
        self.on = not self.on
        if x.sum() > 100:
            x = x * 2
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_first_call_on_tensors_without_data_notes_is_forgotten():
    net = mfx.momentumize(Printing(), gamma=0.0)
    for calls in (1, 2):
        net(torch.randn(3, WIDTH))
        assert (net.calls, net.log, net.on) == ([calls], ["call"] * calls, calls == 1)
        assert net.ready
        assert net.table == {"width": WIDTH}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_after_other_code_was_compiled():
    builder = torch._dynamo.variables.builder.VariableBuilder
    builder._type_dispatch_impl.cache_clear()  # a table that is made once in a process
    assert torch.compile(lambda x, held: x + len(held), backend="eager")(torch.tensor(1), deque([5])) == 2
    check(*QUICK[0])
