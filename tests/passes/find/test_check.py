"""Every reason for which a residual add stays as it is, provoked."""

from __future__ import annotations

import re

import pytest

from mfx_passes import Refusal
from tests.passes.harness import rewrite_model, rewritten, traced
from tests.passes.refusals import REFUSALS
from tests.passes.test_numbers import clones, same


@pytest.mark.parametrize("name", REFUSALS)
def test_reasons(name: str) -> None:
    refusal = REFUSALS[name]
    result = rewritten(traced(refusal.make(), refusal.example() if refusal.shapes else ()), refusal.selection)
    reasons = list(result.reasons.values())
    for pattern, count in refusal.reasons.items():
        assert sum(bool(re.search(pattern, reason)) for reason in reasons) == count, reasons
    assert len(reasons) == sum(refusal.reasons.values()), reasons
    assert sum(len(graphs.steps) for graphs in result.chains) == refusal.steps


def test_every_refusal_is_provoked() -> None:
    provoked = {
        rejection.refusal
        for case in REFUSALS.values()
        for rejection in rewritten(
            traced(case.make(), case.example() if case.shapes else ()), case.selection
        ).rewritten.findings.rejections
    }
    assert provoked == {*Refusal}
    assert {refusal for refusal in Refusal if not refusal.remedy} == {Refusal.UNNAMED, Refusal.OTHER}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_computes_what_it_did(name: str) -> None:
    refusal = REFUSALS[name]
    model, inputs = refusal.make(), refusal.example()
    given, seen = clones(inputs), clones(inputs)
    result = rewrite_model(model, *clones(inputs), selection=refusal.selection)
    assert same(result.run(*given, gamma=0.0), model(*seen))
    assert same(given, seen)


@pytest.mark.parametrize("name", [name for name in REFUSALS if REFUSALS[name].shapes])
def test_without_shapes_these_are_not_refused(name: str) -> None:
    result = rewritten(traced(REFUSALS[name].make()))
    assert not result.reasons
