"""Golden files: what the passes make of each kind of step, and of each thing they refuse, as text to be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.passes.cases import make
from tests.passes.harness import describe
from tests.passes.refusals import REFUSALS
from tests.passes.stream_cases import CASES

GOLDENS = Path(__file__).parent / "goldens"
UPDATE = os.environ.get("MFX_UPDATE_GOLDENS") == "1"


def check(name: str, text: str) -> None:
    path = GOLDENS / f"{name}.txt"
    if UPDATE:
        path.write_text(text)
    assert path.exists(), f"no golden {path.name}; MFX_UPDATE_GOLDENS=1 writes it"
    assert text == path.read_text(), f"{path.name} differs; MFX_UPDATE_GOLDENS=1 rewrites it, then read the diff"


@pytest.mark.parametrize("name", CASES)
def test_step_kind(name: str) -> None:
    case = make(CASES[name])
    check(f"step_{name}", f"{CASES[name].__doc__}\n\n{describe(case)}")


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    refusal = REFUSALS[name]
    text = describe(refusal.make(), refusal.example() if refusal.shapes else (), refusal.selection)
    check(f"refusal_{name}", f"{refusal.model.__doc__}\n\n{text}")


def test_no_golden_is_left_over() -> None:
    expected = {f"step_{name}.txt" for name in CASES} | {f"refusal_{name}.txt" for name in REFUSALS}
    assert {path.name for path in GOLDENS.iterdir()} == expected
