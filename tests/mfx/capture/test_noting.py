"""Values that a forward refers to are noted without running code of their classes."""

from collections import OrderedDict, deque
from threading import Thread

import pytest
import torch
from torch import nn

import mfx
from mfx.modules.python_state import PythonState

RUN: list[str] = []


def lazy(cls):
    """A container that would load its entries when it is asked for them, as tables of model classes do."""

    def method(name):
        def run(self, *args):
            RUN.append(name)
            return getattr(cls, name)(self, *args)

        return run

    names = {"keys", "values", "items", "__iter__", "__len__", "__getitem__", "__contains__", "clear", "extend"}
    return type(f"Lazy{cls.__name__}", (cls,), {name: method(name) for name in names & set(dir(cls))})


HELD = {
    cls.__name__: lazy(cls)(content)
    for cls, content in [
        (dict, {"a": [1]}),
        (OrderedDict, {"a": [1]}),
        (list, [[1]]),
        (tuple, [[1]]),
        (deque, [[1]]),
        (set, [1]),
    ]
}


class Looking(nn.Module):
    """Two steps, and a mention of containers that it does not use."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, kind=None):
        for layer in self.layers:
            x = x + layer(x)
        return x if kind is None else HELD[kind]


def test_no_container_is_asked():
    RUN.clear()
    net = mfx.momentumize(Looking())
    net(torch.ones(2, 4))
    assert RUN == []


@pytest.mark.parametrize("name", ["dict", "OrderedDict", "list", "deque", "set"])
def test_what_is_changed_in_them_is_put_back(name):
    held = HELD[name]
    cls = type(held).__base__
    before = list(cls.__iter__(held))
    state = PythonState(Looking())
    cls.clear(held)
    RUN.clear()
    assert state.put_back()
    assert RUN == []
    assert list(cls.__iter__(held)) == before


class Redraws(Thread):
    """Redraws progress bars at any moment, as the one of tqdm."""

    redrawn = 0


class Bars:
    monitor, drawn = Redraws(), [0]


class Drawing(nn.Module):
    def forward(self, x):
        return x if Bars.drawn else x + 1


@pytest.mark.parametrize("by_thread", [True, False])
def test_what_a_thread_notes_is_no_change_of_the_model(by_thread):
    state = PythonState(Drawing())
    if by_thread:
        Bars.monitor.redrawn += 1
    else:
        Bars.drawn[0] += 1
    assert bool(state.changes()) is not by_thread
