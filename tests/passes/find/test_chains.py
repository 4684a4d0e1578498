from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from torch import Tensor, nn

from mfx_passes import MfxError, Selection, find_chains
from tests.passes.harness import rewrite_model, traced

D = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))
        self.mlp = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Net(nn.Module):
    """Two stages of two blocks each, and a second run through the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(Block(), Block())
        self.down = nn.Linear(D, D)
        self.late = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.down(self.early(x)))
        return self.early(self.down(x))


def chains(model: nn.Module, **selection: object) -> dict[str, list[str]]:
    case = traced(model)
    found = find_chains(case.graph, case.modules, Selection(**selection))
    return {chain.name: [step.path for step in chain.steps] for chain in found.chains}


def steps(stage: str) -> list[str]:
    return [f"{stage}.{i}.{name}" for i in range(2) for name in ("attn", "mlp")]


def test_names_are_common_module_paths_and_unique() -> None:
    # Four steps each; `down` ends one chain and begins the next.
    assert chains(Net()) == {"early": steps("early"), "late": steps("late"), "early#2": steps("early")}


def test_a_chain_of_the_root_is_called_root() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    assert chains(Root()) == {"root": ["a", "b"]}


@pytest.mark.parametrize(
    "selection, expected",
    [
        ({"only": ("late",)}, {"late": steps("late")}),
        ({"only": ("early",)}, {"early": steps("early"), "early#2": steps("early")}),
        ({"only": ("early#2",)}, {"early#2": steps("early")}),
        ({"skip": ("early*",)}, {"late": steps("late")}),
        ({"only": ("late.1",)}, {"late.1": steps("late")[2:]}),
        ({"only": ("late", "early"), "skip": ("*.mlp",)}, {}),
        ({"skip": ("early", "late.0.mlp")}, {"late.1": steps("late")[2:]}),
        (
            {"skip": ("early", "late.0.mlp"), "min_steps": 1},
            {"late.0.attn": ["late.0.attn"], "late.1": steps("late")[2:]},
        ),
        ({"min_steps": 5}, {}),
        ({"only": (("late.0",), ("late.1",))}, {"late.0": steps("late")[:2], "late.1": steps("late")[2:]}),
        (
            {"only": ("late.0", ("late.1",), "early#2")},
            {"late.0": steps("late")[:2], "late.1": steps("late")[2:], "early#2": steps("early")},
        ),
        ({"only": ("late.0", "late.1")}, {"late": steps("late")}),
        ({"only": (("early.0.attn:2", "early.0.mlp:2"),)}, {"early.0": steps("early")[:2]}),
        ({"only": (("late",), ("late.1",))}, {"late": steps("late")}),
    ],
)
def test_selection(selection: dict[str, object], expected: dict[str, list[str]]) -> None:
    assert chains(Net(), **selection) == expected


@pytest.mark.parametrize("option", ["only", "skip"])
def test_a_pattern_that_fits_nothing_is_an_error(option: str) -> None:
    with pytest.raises(MfxError, match=r"'layer3' in only/skip fits no chain .* Chains: early, early#2, late\."):
        chains(Net(), **{option: ("layer3",)})


def test_what_is_left_of_a_cut_chain_is_named_anew() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for f in self.fs:
                x = x + f(x)
            return x

    assert chains(Long(), skip=("fs.2",)) == {"fs": ["fs.0", "fs.1"], "fs#2": ["fs.3", "fs.4"]}


def test_work_is_linear_in_the_number_of_blocks() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(1, 1), nn.ReLU(inplace=True), nn.Linear(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    def lines(blocks: int) -> int:
        model = nn.Sequential(*(Residual() for _ in range(blocks)))
        with executed_lines() as count:
            result = rewrite_model(model)
        assert [len(graphs.steps) for graphs in result.chains] == [blocks]
        return count()

    lines(2)  # imports
    # At most 4 if all is linear. One round of a loop for each pair of blocks would be 4.12.
    assert lines(500) < 4.05 * lines(125)


@contextmanager
def executed_lines() -> Iterator[Callable[[], int]]:
    """Count the lines of Python that run: every round of a loop is one at least. The garbage collector's are not."""
    lines, before = 0, sys.gettrace()

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal lines
        lines += event == "line"
        return count

    gc.disable()  # others may have it call them
    sys.settrace(count)
    try:
        yield lambda: lines
    finally:
        sys.settrace(before)
        gc.enable()
