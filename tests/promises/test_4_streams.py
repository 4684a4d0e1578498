"""Chains of several streams: the recurrence, exact gradients, γ = 0, flat memory, records and reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mfx
from tests.passes.cases import make
from tests.passes.stream_cases import (
    CoAttention,
    Coupling,
    DoubleAndSingle,
    InnerChains,
    InPlaceStreams,
    JointAttention,
    JointInside,
    PostNormStreams,
    SelfAndCross,
    StaleRead,
    TappedStreams,
    ThreeStreams,
    Towers,
)

KINDS = [
    CoAttention, Coupling, DoubleAndSingle, InnerChains, InPlaceStreams, JointAttention, JointInside, PostNormStreams,
    SelfAndCross, StaleRead, TappedStreams, ThreeStreams, Towers,
]  # fmt: skip
WIDTH = 8


def mlp(width: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
    )


class Block(nn.Module):
    """Joint attention of two streams of different widths and lengths, then a step of each."""

    def __init__(self, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * WIDTH) for width in widths)
        self.out = nn.ModuleList(nn.Linear(WIDTH, width) for width in widths)
        self.mlps = nn.ModuleList(mlp(width, dropout) for width in widths)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = torch.cat([self.qkv[0](x), self.qkv[1](c)], 1).chunk(3, -1)
        y = self.drop((q @ k.transpose(1, 2)).softmax(-1)) @ v
        dx, dc = self.out[0](y[:, : x.shape[1]]), self.out[1](y[:, x.shape[1] :])
        x = x + dx
        x = x + self.mlps[0](x)
        c = c + dc
        return x, c + self.mlps[1](c)


class Net(nn.Module):
    def __init__(self, depth: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block((6, 10), dropout) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, c = block(x, c)
        return x, c


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [
        torch.randn(2, 5, 6, dtype=dtype, requires_grad=True),
        torch.randn(2, 3, 10, dtype=dtype, requires_grad=True),
    ]


def step(net: nn.Module, weights: Sequence[float] = (1, 0.5), xs: Sequence[Tensor] = ()) -> list[Any]:
    """The outcome of a training step: outputs, and all gradients."""
    xs = xs or inputs(next(net.parameters()).dtype)
    torch.manual_seed(2)
    outputs = pytree.tree_leaves(net(*xs))
    loss = sum(weight * y.square().sum() for weight, y in zip(weights, outputs, strict=False) if weight)
    wanted = [*[x for x in xs if x.requires_grad], *[p for p in net.parameters() if p.requires_grad]]
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def same(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_recurrence_in_float64(kind: type) -> None:
    model = make(kind)
    torch.manual_seed(1)
    xs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in kind.inputs]
    net = mfx.momentumize(model, gamma=0.9, verify="raise")
    found = step(net, (1, 0.5, 0.25, 2), xs)
    assert same(found, step(mfx.momentumize(model, gamma=0.9, memory_budget=1.0), (1, 0.5, 0.25, 2), xs))
    expected = step(_ByHand(model), (1, 0.5, 0.25, 2), xs)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            # States are rounded to multiples of 2⁻⁴⁰, a dozen times; no branch here enlarges that a hundredfold.
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class _ByHand(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *xs: Tensor) -> Any:
        return self.model.by_hand(0.9, *xs)


def test_all_updates_are_in_one_chain() -> None:
    net = mfx.momentumize(Net())
    explained = mfx.explain(net, *inputs())
    (chain,) = explained.chains
    assert not explained.rejections
    assert (len(chain.steps), len(chain.updates)) == (12, 16)
    assert [[update.stream for update in each.updates] for each in chain.steps] == [["x", "c"], ["x"], ["c"]] * 4
    assert [update.path for update in chain.steps[1].updates] == ["blocks.0.mlps.0"]
    # The velocity of a stream decays at its own updates alone.
    own = [w for w, update in zip(chain.weights, chain.updates, strict=True) if update.stream == "c"]
    assert own == pytest.approx([1 - 0.9 ** (8 - t) for t in range(8)])
    assert "12: 8 of x, 8 of c" in str(explained)
    assert "2×5×6 float32 + 2×3×10 float32" in str(explained)


@pytest.mark.parametrize("weights", [(1, 0.5), (1, 0), (0, 1)])
@pytest.mark.parametrize("budget", [0.0, 0.4, "3KiB"])
def test_gradients_are_those_of_ordinary_backpropagation(weights: tuple[float, ...], budget: float | str) -> None:
    net = mfx.momentumize(Net(), memory_budget=budget, verify="raise")
    step(net, weights)  # from the second call on a budget holds
    assert same(step(net, weights), step(mfx.momentumize(Net(), memory_budget=1.0), weights))


def test_a_frozen_stream_and_a_second_backward_pass() -> None:
    model = Net()
    for block in model.blocks:
        for part in (block.qkv[1], block.out[1], block.mlps[1]):
            part.requires_grad_(False)
    x, c = inputs()
    c.requires_grad_(False)
    net = mfx.momentumize(model, verify="raise")
    assert same(step(net, xs=[x, c]), step(mfx.momentumize(model, memory_budget=1.0), xs=[x, c]))
    outputs = net(x, c)
    (first,) = torch.autograd.grad(outputs[1].sum(), x, retain_graph=True)
    torch.autograd.grad(outputs[0].sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(outputs[1].sum(), x)
    assert torch.equal(first, again)


def test_gradients_of_each_stream_in_passes_of_their_own() -> None:
    """The last branches of both streams share nothing, so each pass frees only what it used."""
    net, plain = (mfx.momentumize(Net(dropout=0.0), memory_budget=budget) for budget in (0.0, 1.0))
    found = []
    for each in (net, plain):
        last = each.blocks[-1].mlps
        outputs = each(*inputs())
        found.append(
            [torch.autograd.grad(y.sum(), [*part.parameters()]) for y, part in zip(outputs, last, strict=True)]
        )
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def test_float_arithmetic_stays_close() -> None:
    found = step(mfx.momentumize(Net(dropout=0.0).double(), arithmetic="float"))
    expected = step(mfx.momentumize(Net(dropout=0.0).double(), arithmetic="float", memory_budget=1.0))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64, and anchors that hold it to 1e-10


@pytest.mark.parametrize("kind", [Net])
def test_gamma_zero_is_the_model_with_its_dropout(kind: type) -> None:
    model = kind()
    assert same(step(mfx.momentumize(model, gamma=0.0)), step(model))


def test_what_is_kept_does_not_grow_with_depth() -> None:
    kept = []
    for depth in (12, 24):
        net = mfx.momentumize(Net(depth, dropout=0.0), gamma=0.9)
        step(net)
        xs = inputs()
        with mfx.ActivationMeter([*net.parameters(), *xs]) as meter:
            outputs = net(*xs)
            kept.append(meter.live)
            del outputs
    # Twice as many updates take γ⁻²⁴ as much room for digits, four bits per element. Inputs would take 24 × 440 bytes.
    elements = sum(x.numel() for x in inputs())
    assert kept[1] - kept[0] <= 2 * elements


def test_the_record_tells_streams_apart() -> None:
    state = mfx.momentumize(Net()).state_dict()
    mfx.momentumize(Net()).load_state_dict(state)
    other = mfx.momentumize(Net(), skip=["blocks.*.mlps.1"])
    with pytest.raises(mfx.MfxError, match="saved with other chains"):
        _load(other, state)


def _load(net: nn.Module, state: dict[str, Any]) -> None:
    net.load_state_dict(state)
    net(*inputs())  # which finds the chains, if none was called before


def test_a_cut_is_explained() -> None:
    explained = mfx.explain(make(StaleRead))
    (cut,) = explained.cuts
    assert "add_3 reads add, which is gone after add_2" in cut.reason
    assert "chains are cut before:" in str(explained)
    assert "add_3" in explained._repr_html_()
    assert explained.to_dict()["cuts"][0]["node"] == "add_3"
    assert all(update.stream in ("x", "c", "add_1", "add_2") for chain in explained.chains for update in chain.updates)


def test_reports_show_streams_side_by_side(tmp_path: Any) -> None:
    net = mfx.momentumize(Net())
    net(*inputs())
    view = mfx.to_networkx(net)
    sums = [facts["stream"] for _, facts in view.nodes(data=True) if facts.get("role") == "sum"]
    assert sums == [0, 1, 0, 1] * 4
    mfx.draw(net, tmp_path / "net.svg", *inputs())
    text = (tmp_path / "net.svg").read_text()
    assert "x ←" in text
    assert "c ←" in text
