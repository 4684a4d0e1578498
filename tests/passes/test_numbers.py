"""Rewritten graphs, run by the plain recurrence, against recurrences written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.oracles import momentum_reference
from tests.passes.cases import example, make
from tests.passes.harness import rewrite_model, rewritten, traced
from tests.passes.stream_cases import CASES


def same(actual: Any, expected: Any) -> bool:
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def clones(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.clone() for x in inputs]


@pytest.mark.parametrize("with_shapes", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_gamma_zero_is_the_model_bit_for_bit(name: str, with_shapes: bool) -> None:
    model, inputs = make(CASES[name]), example(CASES[name])
    result = rewritten(traced(model, clones(inputs) if with_shapes else ()))
    assert result.chains
    assert same(result.run(*clones(inputs), gamma=0.0), model(*clones(inputs)))


@pytest.mark.parametrize("name", CASES)
def test_momentum_is_the_recurrence_by_hand(name: str) -> None:
    model, inputs = make(CASES[name]), example(CASES[name])
    actual = rewrite_model(model, *clones(inputs)).run(*clones(inputs), gamma=0.9)
    # A map step forms f = h(x) - x, which rounds; the steps are few and all values of order one.
    torch.testing.assert_close(actual, model.by_hand(0.9, *clones(inputs)), rtol=1e-13, atol=1e-13)
    assert not same(actual, model(*clones(inputs)))


def test_velocity_is_handed_over() -> None:
    case = CASES["Plain"]
    model, inputs = make(case), example(case)
    model.v0 = torch.nn.Linear(4, 4).double()
    actual = rewritten(traced(model), velocity="v0").run(*inputs, gamma=0.9)
    expected = momentum_reference(list(model.fs), inputs[0], 0.9, velocity=model.v0).output
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
