from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.find.residual_adds import find_adds, find_candidates
from tests.passes.harness import traced


def found(forward: Callable[[Tensor], Tensor]) -> tuple[list[str], list[str]]:
    """The names of the residual adds of a function, and of the sums that only look like one."""

    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    case = traced(Function())
    adds, rejections = find_adds(GraphIndex(case.graph, case.modules))
    return [add.node.name for add in adds], [rejection.node.name for rejection in rejections]


@pytest.mark.parametrize(
    "forward, adds",
    [
        (lambda x: x + x.exp(), ["add"]),
        (lambda x: x.exp() + x, ["add"]),
        (lambda x: x + x, []),
        (lambda x: x + 1, []),
        (lambda x: x + x.exp() + x.sin(), ["add_1"]),
        (lambda x: x.exp() + (x + x.sin()), ["add_1"]),
        (lambda x: (x.exp() + x.sin()) + x, ["add_1"]),
        (lambda x: sum([x, x.exp(), x.sin()]), ["add_2"]),
        (lambda x: x + (x + x.exp()).sin(), ["add", "add_1"]),
        (lambda x: x + x.exp() * x, ["add"]),
        (lambda x: torch.addcmul(x, x.exp(), x.sin()), ["addcmul"]),
        (lambda x: torch.addcmul(x.exp(), x, x), []),
        (lambda x: x - x.exp(), ["sub"]),
        (lambda x: x.flatten(1) + x.exp().flatten(1), ["add"]),
        (lambda x: x.shape[0] + x.shape[0] * x.shape[1], []),
        (lambda x: x.exp() - x, ["sub"]),
        (lambda x: torch.add(x.exp(), x, alpha=2), ["add"]),
        (lambda x: 2 * x + x.exp(), ["add"]),
        (lambda x: x * x.exp() + x.sin(), ["add"]),
        (lambda x: x * x + x.exp(), []),
        (lambda x: x * x.exp() + x * x.sin(), []),
        (lambda x: torch.lerp(x, x.exp(), x.sin()), ["lerp"]),
    ],
)
def test_residual_adds(forward: Callable[[Tensor], Tensor], adds: list[str]) -> None:
    assert found(forward) == (adds, [])


@pytest.mark.parametrize(
    "forward, rejected",
    [
        (lambda x: x.exp().sin() + x.exp().cos(), []),  # they only share an input
        (lambda x: (lambda y: y.sin() + y.cos())(x.exp()), ["add"]),
    ],
)
def test_sums_that_look_residual(forward: Callable[[Tensor], Tensor], rejected: list[str]) -> None:
    assert found(forward) == ([], rejected)


def candidates(forward: Callable[[Tensor], Tensor]) -> list[tuple[str, list[str], list[int]]]:
    """Of each candidate its kind, its adds, and how long their tails are."""

    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    case = traced(Function())
    index = GraphIndex(case.graph, case.modules)
    return [
        (found.kind, [link.add.node.name for link in found.links], [len(link.tail) for link in found.links])
        for found in find_candidates(find_adds(index)[0], index)
    ]


def relu_then_not(x: Tensor) -> Tensor:
    x = F.relu(x + x.exp())
    x = F.relu(x + x.exp())
    x = x + x.sin()
    return x + x.cos()


def final_norm(x: Tensor) -> Tensor:
    x = x + x.exp()
    x = x + x.exp()
    return F.layer_norm(x, (4,))


def two_operations(x: Tensor) -> Tensor:
    x = F.relu(x + x.exp()) * 0.5
    x = F.relu(x + x.exp()) * 0.5
    return x * 2


def other_tail(x: Tensor) -> Tensor:
    x = F.relu(x + x.exp())
    x = F.relu(x + x.exp())
    x = F.gelu(x + x.exp())
    return x + x.exp()


def weight_is_a_state(x: Tensor) -> Tensor:
    weight_of_next = x + x.sin()
    x = F.layer_norm(x + x.exp(), (4,), weight_of_next)
    x = x + x.exp()
    return x + x.cos()


def norm_of_channels(x: Tensor) -> Tensor:
    for _ in range(2):
        x = F.layer_norm((x + x.exp()).transpose(0, 1), (4,)).transpose(0, 1)
    return x


def norm_that_rearranges(x: Tensor) -> Tensor:
    for _ in range(2):
        x = F.layer_norm((x + x.exp()).transpose(0, 1), (4,))
    return x


@pytest.mark.parametrize(
    "forward, expected",
    [
        (norm_of_channels, [("map", ["add", "add_1"], [3, 3])]),
        (norm_that_rearranges, [("residual", ["add"], [0]), ("residual", ["add_1"], [0])]),
        (final_norm, [("residual", ["add", "add_1"], [0, 0])]),
        (two_operations, [("map", ["add", "add_1"], [2, 2])]),
        (relu_then_not, [("map", ["add", "add_1", "add_2"], [1, 1, 0]), ("residual", ["add_3"], [0])]),
        (other_tail, [("map", ["add", "add_1", "add_2"], [1, 1, 0]), ("residual", ["add_3"], [0])]),
        (
            weight_is_a_state,
            [("residual", ["add"], [0]), ("map", ["add_1", "add_2"], [1, 0]), ("residual", ["add_3"], [0])],
        ),
    ],
)
def test_candidates(forward: Callable[[Tensor], Tensor], expected: object) -> None:
    assert candidates(forward) == expected
