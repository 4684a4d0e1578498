from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import fx, nn

from mfx_passes.ops import vocabulary

X = fx.Graph()
x, y = X.placeholder("x"), X.placeholder("y")


def function(target, *args, **kwargs):
    return X.call_function(target, args, kwargs)


def method(name, *args, **kwargs):
    return X.call_method(name, args, kwargs)


def module(of):
    node = X.call_module("m", (x,))
    return node, {"m": of}


IN_PLACE = [
    function(operator.iadd, x, y),
    function(operator.setitem, x, 0, y),
    function(torch.relu_, x),
    function(F.relu, x, inplace=True),
    function(F.relu, x, True),
    function(F.dropout, x, 0.5, True, True),
    function(torch.nn.init.zeros_, x),
    method("add_", x, y),
    method("__iadd__", x, y),
    method("__setitem__", x, 0, y),
    method("clamp_", x, min=0),
]
NOT_IN_PLACE = [
    function(operator.and_, x, y),
    function(operator.or_, x, y),
    function(operator.not_, x),
    function(operator.add, x, y),
    function(F.relu, x),
    function(F.relu, x, False),
    method("__add__", x, y),
    method("__and__", x, y),
    method("__invert__", x),
    method("relu", x),
]


@pytest.mark.parametrize("node", IN_PLACE, ids=str)
def test_in_place_operations_change_their_first_operand(node: fx.Node) -> None:
    assert vocabulary.mutated_operand(node, {}) is x


@pytest.mark.parametrize("node", NOT_IN_PLACE, ids=str)
def test_operations_that_only_sound_in_place(node: fx.Node) -> None:
    assert vocabulary.mutated_operand(node, {}) is None


def test_in_place_modules() -> None:
    assert vocabulary.mutated_operand(*module(nn.ReLU(inplace=True))) is x
    assert vocabulary.mutated_operand(*module(nn.ReLU())) is None


def test_an_out_argument_is_changed() -> None:
    assert vocabulary.mutated_operand(function(torch.add, x, 1, out=y), {}) is y


def test_who_returns_what_it_changed() -> None:
    def touch_(value):
        return None

    returning = [node for node in IN_PLACE if vocabulary.returns_operand(node)]
    assert [node for node in IN_PLACE if node not in returning] == [IN_PLACE[1], IN_PLACE[9]]
    assert vocabulary.mutated_operand(function(touch_, x), {}) is x
    assert not vocabulary.returns_operand(function(touch_, x))


@pytest.mark.parametrize(
    "node, expected",
    [
        (method("contiguous", x), vocabulary.NEUTRAL),
        (method("to", x, torch.float64), vocabulary.NEUTRAL),
        (function(torch.clone, x), vocabulary.NEUTRAL),
        (function(operator.add, 0, x), vocabulary.NEUTRAL),
        (function(operator.add, x, 0), vocabulary.NEUTRAL),
        (function(operator.add, x, 1), None),
        (method("view", x, 2, -1), vocabulary.RESHAPE),
        (method("view", x, torch.int32), None),
        (method("view", x, dtype=torch.int32), None),
        (function(torch.flatten, x, 1), vocabulary.RESHAPE),
        (method("permute", x, 0, 2, 1), ("permute", 0, 2, 1)),
        (method("permute", x, (0, 2, 1)), ("permute", 0, 2, 1)),
        (function(torch.permute, x, dims=(0, 2, 1)), ("permute", 0, 2, 1)),
        (method("permute", x, y), None),
        (method("transpose", x, 1, 2), ("transpose", 1, 2)),
        (method("relu", x), None),
        (function(rearrange, x, "b c h w -> b (c h) w"), vocabulary.RESHAPE),
        (function(rearrange, x, "b ... 1 -> b ..."), vocabulary.RESHAPE),
        (function(rearrange, x, "b n d -> b d n"), ("permute", 0, 2, 1)),
        (function(rearrange, x, "b n d -> b n d"), vocabulary.NEUTRAL),
        (function(rearrange, [x, y], "s b d -> b s d"), None),
    ],
    ids=str,
)
def test_layout(node: fx.Node, expected: object) -> None:
    assert vocabulary.layout(node, {}) == expected


def test_identity_is_neutral() -> None:
    assert vocabulary.layout(*module(nn.Identity())) == vocabulary.NEUTRAL
    assert vocabulary.layout(*module(nn.Linear(1, 1))) is None


@pytest.mark.parametrize(
    "after, before, expected",
    [
        (("transpose", 2, 1), ("transpose", 1, 2), True),
        (("transpose", -2, -1), ("transpose", 1, 2), False),  # for three dimensions it would; nobody knows here
        (("permute", 0, 3, 1, 2), ("permute", 0, 2, 3, 1), True),
        (("permute", 0, 2, 3, 1), ("permute", 0, 2, 3, 1), False),
        (("permute", 0, -1, 1, 2), ("permute", 0, 2, -1, 1), True),
        (("permute", 0, 2, 1), ("transpose", 1, 2), False),
        (vocabulary.RESHAPE, vocabulary.RESHAPE, True),
        (vocabulary.RESHAPE, ("transpose", 1, 2), False),
    ],
)
def test_undoes(after: tuple[object, ...], before: tuple[object, ...], expected: bool) -> None:
    assert vocabulary.undoes(after, before) is expected


@pytest.mark.parametrize(
    "after, before, expected",
    [
        ("b (h w) c -> b c h w", "b c h w -> b (h w) c", True),
        ("n (u v) e -> n e u v", "b c h w -> b (h w) c", True),
        ("b (w h) c -> b c h w", "b c h w -> b (h w) c", False),
        ("... (h w) c -> ... c h w", "... c h w -> ... (h w) c", True),
        ("b x y (p q) d -> b d (x p) (y q)", "b d (x p) (y q) -> b x y (p q) d", True),
        ("b x y (p q) d -> b d (p x) (q y)", "b d (x p) (y q) -> b x y (p q) d", False),
    ],
)
def test_undoes_of_einops(after: str, before: str, expected: bool) -> None:
    kinds: list[Any] = [vocabulary.layout(function(rearrange, x, pattern), {}) for pattern in (after, before)]
    assert vocabulary.undoes(*kinds) is expected


def test_undoes_is_right_about_permutations() -> None:
    value = torch.randn(2, 3, 4, 5)
    assert torch.equal(value.permute(0, 2, -1, 1).permute(0, -1, 1, 2), value)


@pytest.mark.parametrize(
    "node, expected",
    [
        (method("detach", x), True),
        (method("chunk", x, 2), True),
        (function(operator.getitem, x, 0), True),
        (function(getattr, x, "T"), True),
        (function(F.dropout, x, 0.1, False), True),
        (method("relu", x), False),
        (function(getattr, x, "shape"), False),
        (function(torch.cat, [x, y]), False),
    ],
    ids=str,
)
def test_may_alias(node: fx.Node, expected: bool) -> None:
    assert vocabulary.may_alias(node, {}) is expected


def test_dropout_may_hand_its_input_on() -> None:
    assert vocabulary.may_alias(*module(nn.Dropout2d()))
    assert not vocabulary.may_alias(*module(nn.ReLU()))


def test_sizes() -> None:
    shape = function(getattr, x, "shape")
    sizes = {shape}
    assert vocabulary.is_size(shape, set())
    assert vocabulary.is_size(method("size", x, 1), set())
    assert vocabulary.is_size(function(operator.getitem, shape, 0), sizes)
    assert not vocabulary.is_size(function(operator.getitem, x, 0), sizes)
    assert not vocabulary.is_size(function(torch.zeros, shape), sizes)


@pytest.mark.parametrize("of", [nn.ReLU(), nn.LayerNorm(1), nn.BatchNorm2d(1), nn.Dropout(), nn.Identity()], ids=str)
def test_tail_modules(of: nn.Module) -> None:
    assert vocabulary.is_tail(*module(of))


@pytest.mark.parametrize(
    "of", [nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.MultiheadAttention(1, 1), nn.Sequential()], ids=str
)
def test_no_tail_modules(of: nn.Module) -> None:
    assert not vocabulary.is_tail(*module(of))


def test_tail_functions() -> None:
    parameter = X.get_attr("p")
    assert vocabulary.is_tail(function(F.gelu, x), {})
    assert vocabulary.is_tail(method("relu", x), {})
    assert vocabulary.is_tail(function(operator.mul, x, 0.5), {})
    assert vocabulary.is_tail(function(operator.mul, parameter, x), {})
    assert not vocabulary.is_tail(function(operator.mul, x, y), {})
    assert not vocabulary.is_tail(function(F.linear, x, y), {})
