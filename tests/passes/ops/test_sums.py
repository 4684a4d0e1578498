from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from mfx_passes.ops import sums
from mfx_passes.ops.sums import Term

G = fx.Graph()
x, f, g = G.placeholder("x"), G.placeholder("f"), G.placeholder("g")
X, Y = Term((x,)), Term((f,))


@pytest.mark.parametrize(
    "node, expected",
    [
        (G.call_function(operator.add, (x, f)), (X, Y)),
        (G.call_function(operator.add, (f, x)), (Y, X)),
        (G.call_function(operator.iadd, (x, f)), (X, Y)),
        (G.call_function(torch.add, (x, f), {"alpha": 2}), (X, Term((f,), 2))),
        (G.call_function(torch.add, (), {"input": x, "other": f}), (X, Y)),
        (G.call_method("add", (x,), {"other": f}), (X, Y)),
        (G.call_method("add_", (x, f)), (X, Y)),
        (G.call_method("__add__", (x, f)), (X, Y)),
        (G.call_function(operator.sub, (x, f)), (X, Term((f,), -1))),
        (G.call_function(torch.sub, (x, f), {"alpha": 3}), (X, Term((f,), -3))),
        (G.call_method("sub_", (x, f)), (X, Term((f,), -1))),
        (G.call_function(torch.addcmul, (x, f, g)), (X, Term((f, g)))),
        (G.call_function(torch.addcmul, (x, f, g), {"value": 0.5}), (X, Term((f, g), 0.5))),
        (G.call_method("addcmul_", (x, f), {"tensor2": g}), (X, Term((f, g)))),
        (G.call_function(operator.add, (x, 1)), None),
        (G.call_function(torch.add, (x, f), {"alpha": g}), None),
        (G.call_function(torch.add, (x, f), {"out": g}), None),
        (G.call_function(operator.mul, (x, f)), None),
    ],
    ids=str,
)
def test_terms(node: fx.Node, expected: object) -> None:
    assert sums.terms(node) == expected


def test_a_term_is_a_node_only_if_nothing_is_done_to_it() -> None:
    assert X.node is x
    assert Term((x,), 2).node is None
    assert Term((x, f)).node is None


@pytest.mark.parametrize(
    "node, expected",
    [
        (G.call_function(operator.iadd, (x, f)), operator.add),
        (G.call_function(operator.isub, (x, f)), operator.sub),
        (G.call_method("add_", (x, f)), "add"),
        (G.call_method("__iadd__", (x, f)), "add"),
        (G.call_method("addcmul_", (x, f, g)), "addcmul"),
        (G.call_function(operator.add, (x, f)), operator.add),
    ],
    ids=str,
)
def test_out_of_place(node: fx.Node, expected: object) -> None:
    assert sums.out_of_place(node) == expected
