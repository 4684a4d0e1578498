"""Traced values that outlive a trace are taken out of what holds them, with few looks at all objects."""

import gc
import weakref
from collections import OrderedDict
from types import SimpleNamespace
from unittest import mock

import pytest
from torch import fx

from mfx.capture.symbolic import leftovers
from mfx.capture.symbolic.leftovers import Leftovers


class Holder:
    def __init__(self, value):
        self.value = value


class Output(OrderedDict):
    """As of transformers: fields that are there for good."""

    def __delitem__(self, key):
        raise TypeError("a field cannot be deleted")


class Numbered(list):
    def clear(self):
        raise TypeError("an entry cannot be deleted")


HOLD = {
    "attribute": Holder,
    "list": lambda proxy: [proxy],
    "dictionary": lambda proxy: {"a": proxy},
    "dictionary that refuses": lambda proxy: Output(a=1, b=proxy),
    "list that refuses": lambda proxy: Numbered([1, proxy]),
    "tuple in an attribute": lambda proxy: Holder((proxy, 1)),
    "tuples in a list": lambda proxy: [((proxy,), 2)],
}


def left(count, hold):
    """Return leftovers that know so many proxies, what holds these, and weak references to them."""
    graph, known = fx.Graph(), Leftovers()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(count)]
    for proxy in proxies:
        known.add(proxy)
    return known, [hold(proxy) for proxy in proxies], [weakref.ref(proxy) for proxy in proxies]


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
def test_nothing_holds_them_any_more(hold):
    known, holders, proxies = left(3, hold)
    known.take_away()
    assert len(known.found) == 1
    assert not any(proxy() for proxy in proxies)
    assert len(holders) == 3


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
def test_the_number_of_looks_does_not_grow_with_the_number_of_values(hold):
    looks = []

    def counting(*values):
        looks.append(len(values))
        return gc.get_referrers(*values)

    with mock.patch.object(leftovers, "gc", SimpleNamespace(collect=gc.collect, get_referrers=counting)):
        counts = []
        for count in (2, 40):
            known, _holders, proxies = left(count, hold)
            looks.clear()
            known.take_away()
            assert not any(proxy() for proxy in proxies)
            counts.append(len(looks))
    assert counts[0] == counts[1] <= 5
