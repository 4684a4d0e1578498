"""Tensors that einops packs and unpacks: one is reshaped, several are put together, and all of them are the stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from einops import EinopsError, pack, unpack
from torch import Tensor, nn

import mfx
from mfx.net.forward import forward_of
from mfx_passes.ops.packing import merged, parted
from tests.models.step import assert_bit_equal, train_step
from tests.oracles import momentum_reference

D = 4
Between = Callable[[Tensor], Tensor]


class Steps(nn.Module):
    """Four steps x + f(x), with something in between."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            x = self.between(x + f(x))
        return x


def there_and_back(x: Tensor) -> Tensor:
    packed, shapes = pack([x], "* d")
    (x,) = unpack(packed, shapes, "* d")
    return x


def in_two_ways(x: Tensor) -> Tensor:
    x, outer = pack([x], "b h * d")
    x, inner = pack([x], "* n d")
    x = unpack(x, inner, "* n d")[0]
    return unpack(x, outer, "b h * d")[0]


def of_several(*counts: int) -> Between:
    """Pieces along the second dimension, of any number of dimensions, packed again."""

    def between(x: Tensor) -> Tensor:
        shapes = [torch.Size([n]) if i else torch.Size([n, 1]) for i, n in enumerate(counts)]
        return pack(unpack(x, shapes, "b * w d"), "b * w d")[0]

    return between


def one_of_no_dimension(x: Tensor) -> Tensor:
    first, rest = x[:, 0], x[:, 1:]
    both, shapes = pack([first, rest], "b * w d")
    first, rest = unpack(both, shapes, "b * w d")
    return pack([first, rest], "b * w d")[0]


def swapped(x: Tensor) -> Tensor:
    a, b = unpack(x, [torch.Size([1]), torch.Size([2])], "b * w d")
    return pack([b, a], "b * w d")[0]


def one_changed(x: Tensor) -> Tensor:
    a, b = unpack(x, [torch.Size([1]), torch.Size([2])], "b * w d")
    return pack([a, b.relu()], "b * w d")[0]


def along_another_dimension(x: Tensor) -> Tensor:
    a, b = unpack(x.expand(-1, -1, 3, -1).contiguous(), [torch.Size([1]), torch.Size([2])], "b * w d")
    return pack([a.mT.mT.reshape(2, 3, 1, D), b.reshape(2, 3, 2, D)], "b w * d")[0]


WHOLE = {
    "one": there_and_back,
    "one, in two ways": in_two_ways,
    "two": of_several(1, 2),
    "three": of_several(1, 1, 1),
}
PARTLY = {"in another order": swapped, "one changed": one_changed, "along another dimension": along_another_dimension}
WAYS = ["symbolic", "dynamo"]


def chains(net: nn.Module) -> list[int]:
    forward = forward_of(net)
    return [] if forward is None else [len(chain.steps) for chain in mfx.explain(net).chains]


def example(width: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, width, D, dtype=torch.float64)


@pytest.mark.parametrize("capture", WAYS)
@pytest.mark.parametrize("between", WHOLE.values(), ids=WHOLE)
def test_what_is_packed_is_the_stream(between: Between, capture: str) -> None:
    model, x = Steps(between).double(), example()
    assert torch.equal(between(x), x)
    net = mfx.momentumize(model, gamma=0.9, capture=capture, arithmetic="float")
    torch.testing.assert_close(net(x), momentum_reference(list(model.fs), x, 0.9).output)
    assert chains(net) == [4]
    assert_bit_equal(train_step(mfx.momentumize(model, gamma=0.0, capture=capture), (x,)), train_step(model, (x,)))


@pytest.mark.filterwarnings("ignore:mfx. Steps has no chain")
@pytest.mark.parametrize("capture", WAYS)
@pytest.mark.parametrize("between", PARTLY.values(), ids=PARTLY)
def test_another_value_is_not(between: Between, capture: str) -> None:
    model, x = Steps(between).double(), example(3)
    assert not torch.equal(between(x), x)
    net = mfx.momentumize(model, gamma=0.9, capture=capture)
    assert torch.equal(net(x), model(x))
    assert chains(net) == []


class Windows(nn.Module):
    """MaxViT: pixels in windows, with registers beside them for a step; then a step of pixels, and one of images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.conv = nn.Linear(D, D), nn.Linear(D, D), nn.Conv2d(D, D, 1)
        self.registers = nn.Parameter(torch.randn(2, D))

    def forward(self, x: Tensor) -> Tensor:
        x, shape = pack([x.permute(0, 2, 3, 1)], "b * d")
        x, both = pack([self.registers.expand(x.shape[0], -1, -1), x], "b * d")
        _, x = unpack(x + self.first(x), both, "b * d")
        x = x + self.second(x)
        (x,) = unpack(x, shape, "b * d")
        x = x.permute(0, 3, 1, 2)
        return x + self.conv(x)


@pytest.mark.parametrize("capture", WAYS)
def test_a_step_of_what_was_unpacked_goes_on_in_another_layout(capture: str) -> None:
    model, x = Windows(), torch.randn(2, D, 3, 5)
    net = mfx.momentumize(model, gamma=0.9, capture=capture)
    assert not torch.equal(net(x), model(x))
    assert chains(net) == [2]
    assert_bit_equal(train_step(mfx.momentumize(model, gamma=0.0, capture=capture), (x,)), train_step(model, (x,)))


@pytest.mark.filterwarnings("ignore:mfx. Steps has no chain")
@pytest.mark.parametrize("shapes", [[(-1, 1)], [(1,), (-1,)]], ids=["one", "two"])
def test_lengths_may_be_left_open(shapes: list[tuple[int, ...]]) -> None:
    model, x = Steps(lambda x: pack(unpack(x, shapes, "b * w d"), "b * w d")[0]).double(), example()
    net = mfx.momentumize(model, gamma=0.9, arithmetic="float")
    whole = len(shapes) == 1
    expected = momentum_reference(list(model.fs), x, 0.9).output if whole else model(x)
    torch.testing.assert_close(net(x), expected)
    assert chains(net) == ([4] if whole else [])


@pytest.mark.parametrize("pattern, x", [("a b c d e *", example()), ("b *", example()[0])], ids=["pack", "unpack"])
def test_what_does_not_fit_its_pattern_is_an_error(pattern: str, x: Tensor) -> None:
    shapes = [torch.Size([D])]
    between = (lambda x: pack([x], pattern)[0]) if len(pattern) > 3 else (lambda x: unpack(x, shapes, pattern)[0])
    model = Steps(between).double()
    with pytest.raises(EinopsError):
        model(x)
    with pytest.raises((EinopsError, RuntimeError), match="dim"):
        mfx.momentumize(model, gamma=0.9)(x)


def test_merged_and_parted_undo_each_other() -> None:
    x = example()
    for before in range(3):
        for after in range(3 - before):
            one, (shape,) = pack([x], " ".join([*"abc"[:before], "*", *"xyz"[:after]]))
            assert torch.equal(merged(x, before, after), one)
            assert torch.equal(parted(one, before, after, shape), x)
