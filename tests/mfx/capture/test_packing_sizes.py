"""Packing in calls of several sizes: TorchDynamo's later graphs have symbols where the first one has numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import einops
import pytest
import torch
from einops import pack, unpack
from torch import Tensor, nn

import mfx
from tests.models.step import assert_bit_equal, train_step
from tests.oracles import momentum_reference

D = 4
SIZES = [(4, 4, 4), (3, 4, 4), (3, 5, 4), (2, 5, 6), (3, 1, 5), (1, 4, 3)]
"""Batch, height and width of the calls."""


class Registers(nn.Module):
    """Four steps of an image packed with registers; what stands between the steps is unpacked and packed again."""

    def __init__(self, between: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.between = between

    def forward(self, registers: Tensor, x: Tensor) -> Tensor:
        pieces: Sequence[Tensor] = (registers, x, registers)
        for f in self.fs:
            y, shapes = pack(self.between(pieces), "b * d")
            y = y + f(y)
            pieces = unpack(y, shapes, "b * d")
        return pack(pieces, "b * d")[0]


class Reshapes(nn.Module):
    """The same, with reshapes written by hand, one with its shape as a keyword, both with a length left open."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, registers: Tensor, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        y = torch.cat([registers, x.reshape(b, h * w, D), registers], dim=1)
        for f in self.fs:
            y = (y + f(y)).reshape(shape=(b, -1, 2, 2)).reshape(-1, h * w + 4, D)
        return y


class ByAttribute(nn.Module):
    """The same, with functions that are read off the module einops."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, registers: Tensor, x: Tensor) -> Tensor:
        pieces: Sequence[Tensor] = (registers, x, registers)
        for f in self.fs:
            y, shapes = einops.pack(pieces, "b * d")
            pieces = einops.unpack(y + f(y), shapes, "b * d")
        return einops.pack(pieces, "b * d")[0]


class LengthsOfShape(nn.Module):
    """The same, with the lengths of the pieces read off a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, registers: Tensor, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        y = pack([registers, x, registers], "b * d")[0]
        for f in self.fs:
            y = y + f(y)
            y = pack(unpack(y, [(2,), (h, w), (2, 1)], "b * d"), "b * d")[0]
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pieces": lambda: Registers(lambda pieces: pieces),
    "reshapes": Reshapes,
    "by attribute": ByAttribute,
    "lengths of a shape": LengthsOfShape,
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
each_way = pytest.mark.parametrize("capture", ["symbolic", "dynamo", "auto"])


def example(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch + height)
    x = torch.randn(batch, height, width, D, dtype=torch.float64)
    return torch.randn(batch, 2, D, dtype=torch.float64), x


@each_way
@each_model
def test_calls_of_all_sizes_have_the_same_chain(make: Callable[[], nn.Module], capture: str) -> None:
    model = make().double()
    net = mfx.momentumize(model, gamma=0.9, capture=capture, arithmetic="float")
    for training in (True, False):
        net.train(training)
        for sizes in SIZES:
            registers, x = example(*sizes)
            packed = pack([registers, x, registers], "b * d")[0]
            expected = momentum_reference(list(model.fs), packed, 0.9).output
            torch.testing.assert_close(net(registers, x), expected)
            assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]


@each_way
@each_model
def test_calls_of_all_sizes_are_the_model_at_gamma_zero(make: Callable[[], nn.Module], capture: str) -> None:
    model = make().double()
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    for sizes in SIZES:
        assert_bit_equal(train_step(net, example(*sizes)), train_step(model, example(*sizes)))


class Turned(nn.Module):
    """Steps of images whose height and width change places: the stream goes on where both are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            packed, shapes = pack([x + f(x)], "b * d")
            (x,) = unpack(packed, [(shapes[0][1], shapes[0][0])], "b * d")
        return x


@each_way
@pytest.mark.parametrize("last", [(2, 5, 4), (2, 5, 5)], ids=["other lengths", "the same lengths"])
def test_lengths_that_are_equal_in_one_call_are_not_taken_for_equal(capture: str, last: tuple[int, int, int]) -> None:
    model = Turned().double()
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    for sizes in ((2, 3, 4), (2, 4, 4), last, (2, 4, 6)):
        x = example(*sizes)[1:]
        assert_bit_equal(train_step(net, x), train_step(model, x))
