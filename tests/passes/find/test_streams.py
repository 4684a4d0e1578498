"""Streams that are one chain: what brings rows together, why a chain is cut, and the work of the search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfx_passes import find_chains
from tests.passes.find.test_chains import executed_lines
from tests.passes.harness import rewrite_model, traced

D = 4


class Joint(nn.Module):
    """A branch over both streams, with a chain of its own inside, then a step of each."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(torch.cat([x, c], 1))
        y = y + self.f(y)
        y = (y + self.f(y)).sin()
        x = x + y[:, : x.shape[1]]
        c = c + y[:, x.shape[1] :]
        return x + self.f(x), c + self.f(c)


class Net(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(blocks))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, c = block(x, c)
        return x, c


def test_work_is_linear_in_the_number_of_joint_blocks() -> None:
    def lines(blocks: int) -> int:
        case = traced(Net(blocks))
        with executed_lines() as count:
            found = find_chains(case.graph, case.modules)
        assert [len(chain.steps) for chain in found.chains] == [3 * blocks, *[2] * blocks]
        return count()

    lines(2)  # imports
    # At most 4 if all is linear. One round of a loop for each pair of blocks would be more.
    assert lines(80) < 4.02 * lines(20)


class Masked(nn.Module):
    """A sum that is read and reads, once in all: no stream, for it would count a tenth at gamma = 0.9."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.fs[0](x + mask)
        x = x + self.fs[1](x)
        scores = mask + self.fs[2](x)
        x = x + scores.softmax(-1)
        return x + self.fs[3](x)


def test_a_sum_by_itself_is_no_stream() -> None:
    result = rewrite_model(Masked(), torch.randn(2, 3, D), torch.randn(2, 3, D))
    (chain,) = result.chains
    assert (len(chain.steps), chain.streams) == (4, ("x",))
    assert "a single residual step; chains have at least 2" in result.reasons.values()


class Late(nn.Module):
    """Draws random numbers for two streams in turns, while one reads what the other one gives later."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop = nn.Linear(D, D), nn.Dropout()

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            x = x + self.f(c)
            early = self.drop(self.f(c))
            x = x + self.drop(self.f(x))
            c = c + early * x
        return x, c


def test_a_cut_says_why() -> None:
    case = traced(Late())
    found = find_chains(case.graph, case.modules)
    assert [cut.reason for cut in found.cuts] == [
        "not in one chain with add_1: add_2 reads what add_1 gives, but add_2 draws random numbers before add_1 does",
        "not in one chain with add_4: add_5 reads what add_4 gives, but add_5 draws random numbers before add_4 does",
    ]
