"""Modules that consist of whole steps of a chain."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from mfx_passes.ir import Container
from tests.passes.harness import rewrite_model

D = 4


class Block(nn.Module):
    """Two steps; written out, in place, or with a norm behind them."""

    def __init__(self, *, style: str = "plain") -> None:
        super().__init__()
        self.style = style
        self.mix, self.mlp = nn.Linear(D, D), nn.Linear(D, D)
        if style == "norm":
            self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "in place":
            x = x + self.mix(x).tanh()
            x += self.mlp(x).tanh()
            return x
        x = x + self.mix(x).tanh()
        x = x + self.mlp(x).tanh()
        return self.norm(x) if self.style == "norm" else x


class Stage(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Net(nn.Module):
    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages, self.head = nn.Linear(D, D), nn.ModuleList(stages), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class Outer(nn.Module):
    """A step whose branch holds a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner, self.up = nn.Linear(D, D), Stage(Block(), Block()), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.inner(self.down(x)))


def containers_of(model: nn.Module) -> dict[str, tuple[Container, ...]]:
    return {chain.name: chain.containers for chain in rewrite_model(model).chains}


@pytest.mark.parametrize("style", ["plain", "in place"])
def test_containers_around_others_come_first(style):
    model = Net(Stage(Block(style=style), Block(style=style)), Block(style=style))
    (found,) = containers_of(model).values()
    assert found == (
        Container("stages.0", 0, 4),
        Container("stages.0.blocks.0", 0, 2),
        Container("stages.0.blocks.1", 2, 4),
        Container("stages.1", 4, 6),
    )


def test_a_module_that_is_called_again_is_several_containers():
    block = Block()
    (found,) = containers_of(Net(block, block)).values()
    assert found == (Container("stages.0", 0, 2), Container("stages.0", 2, 4))


def test_what_reads_a_parameter_beside_the_steps_does_not_consist_of_steps():
    for found in containers_of(Net(Stage(Block(), Block(style="norm")))).values():
        assert [container.path for container in found] == ["stages.0.blocks.0"]


def test_inner_chains_have_containers_of_their_own():
    found = containers_of(Net(Outer(), Outer()))
    inner = found.pop("stages.0.inner.blocks")
    assert [container.path for container in inner] == [
        "stages.0.inner",
        "stages.0.inner.blocks.0",
        "stages.0.inner.blocks.1",
    ]
    assert found["stages"] == (Container("stages.0", 0, 1), Container("stages.1", 1, 2))


def test_a_container_under_another_name_than_its_steps_read_is_none():
    """A call of a chain is handed what its steps read, and nothing else."""

    class Renamed(Net):
        def __init__(self) -> None:
            stage = Stage(Block(), Block())
            super().__init__(stage)
            self.stages, self.blocks, self.whole = nn.ModuleList(), stage.blocks, stage

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.whole(self.stem(x)))

    model = Renamed()
    (chain,) = rewrite_model(model).chains
    roots = {target.split(".")[0] for step in chain.steps for target in step.targets}
    assert {container.path.split(".")[0] for container in chain.containers} <= roots
