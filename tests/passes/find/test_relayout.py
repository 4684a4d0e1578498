from __future__ import annotations

import re

import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from mfx_passes import Selection, find_chains
from tests.passes.cases import Windows, example, make
from tests.passes.harness import code_of, rewrite_model, traced

D = 4
IMAGES, WINDOW = (2, D, 4, 6), {"p": 2, "q": 3}


def test_one_chain_in_spite_of_the_windows() -> None:
    result = rewrite_model(make(Windows), *example(Windows))
    (graphs,) = result.chains
    assert [step.kind for step in graphs.steps] == ["residual", "map", "map", "map", "map", "residual"]
    assert not result.reasons


@pytest.mark.parametrize(
    "selection, steps",
    [
        # Two sums in windows need no detour if neither what is before nor what is behind them is rewritten.
        (Selection(skip=("convs.*",)), [4]),
        (Selection(min_steps=7), []),
        (Selection(only=("fs.0", "fs.1")), [2]),
    ],
)
def test_what_is_in_no_chain_is_left_as_it_was(selection: Selection, steps: list[int]) -> None:
    model, (x,) = make(Windows), example(Windows)
    result = rewrite_model(model, x, selection=selection)
    assert [len(graphs.steps) for graphs in result.chains] == steps
    assert torch.equal(result.run(x, gamma=0.0), model(x))
    if not steps:
        assert code_of(result.graph) == code_of(traced(model).graph)


def test_a_chain_that_stays_in_its_windows_is_left_there() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = x.flatten(2).transpose(1, 2)
            for f in self.fs:
                y = y + f(y)
            return y.transpose(1, 2).unflatten(2, (3, 5))

    case = traced(Model())
    before = code_of(case.graph)
    (chain,) = find_chains(case.graph, case.modules).chains
    assert [update.kind for update in chain.updates] == ["residual"] * 3
    assert code_of(case.graph) == before


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_single_sum_in_another_layout_is_put_back(blocks: int) -> None:
    """TinyViT: between convolutions, one sum of tokens and one of images."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(2 * blocks))
            self.convs = nn.ModuleList(nn.Conv2d(D, D, 1) for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            for i, conv in enumerate(self.convs):
                x = conv(x.permute(0, 3, 1, 2))
                y = x.flatten(2).transpose(1, 2)
                y = y + self.fs[2 * i](y)
                x = y.reshape(2, 4, 6, D)
                x = x + self.fs[2 * i + 1](x)
            return x

    model, x = Model(), torch.randn(2, 4, 6, D)
    result = rewrite_model(model, x)
    assert [len(graphs.steps) for graphs in result.chains] == [2] * blocks
    assert torch.equal(result.run(x, gamma=0.0), model(x))
    assert not torch.equal(result.run(x, gamma=0.5), model(x))


def test_modules_inside_are_folded_all_the_same() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))
            self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))

        def forward(self, x: Tensor) -> Tensor:
            y = x.permute(0, 2, 3, 1)
            y = y + self.attn(y)
            y = y + self.mlp(y)
            return y.permute(0, 3, 1, 2)

    (graphs,) = rewrite_model(nn.Sequential(Block(), Block())).chains
    called = [node.target for step in graphs.steps for node in step.branch.nodes if node.op == "call_module"]
    assert called == ["0.attn", "0.mlp", "1.attn", "1.mlp"]
    assert [step.path for step in graphs.steps] == called


@pytest.mark.parametrize("as_layers", [False, True])
@pytest.mark.parametrize(
    "there, back, lengths, shape",
    [
        ("b c h w -> b (h w) c", "b (h w) c -> b c h w", {"h": 4}, IMAGES),
        ("b d (x p) (y q) -> b x y p q d", "b x y p q d -> b d (x p) (y q)", WINDOW, IMAGES),
        (
            "b d (p x) (q y) -> (b x y) (p q) d",
            "(b x y) (p q) d -> b d (p x) (q y)",
            {**WINDOW, "x": 2, "y": 2},
            IMAGES,
        ),
        ("b n 1 -> b n", "b n -> b n 1", {}, (2, D, 1)),
    ],
)
def test_einops(there: str, back: str, lengths: dict[str, int], shape: tuple[int, ...], as_layers: bool) -> None:
    """One chain in spite of them, whose states were put back by another ``rearrange``."""

    def given(pattern: str) -> dict[str, int]:
        """Lengths of the axes that the left side splits a dimension into."""
        split = " ".join(re.findall(r"\((.*?)\)", pattern.split("->")[0])).split()
        return {axis: lengths[axis] for axis in split if axis in lengths}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.there, self.back = Rearrange(there, **given(there)), Rearrange(back, **given(back))
            self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.scale * x.sin()
            y = self.there(x) if as_layers else rearrange(x, there, **given(there))
            for f in self.fs:
                y = y + f(y)
            x = self.back(y) if as_layers else rearrange(y, back, **given(back))
            return x + self.scale * x.cos()

    model, x = Model(), torch.randn(shape)
    result = rewrite_model(model, x)
    assert [len(graphs.steps) for graphs in result.chains] == [4]
    assert torch.equal(result.run(x, gamma=0.0), model(x))
