"""Scaled and gated skips: steps h(x), with f = h(x) - x, in a chain with plain steps or where they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfx_passes import MfxError, Selection
from tests.oracles import momentum_reference
from tests.passes.harness import rewrite_model

D = 4
Update = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """A plain step, if there is to be one, and a step with a scaled skip."""

    def __init__(self, update: Update, plain: bool) -> None:
        super().__init__()
        self.f, self.h, self.gate = (nn.Linear(D, D) for _ in range(3))
        self.scale, self.number = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(()))
        self.register_buffer("alpha", torch.tensor(1.5))
        self.update, self.plain = update, plain

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x) if self.plain else x
        return self.update(self, x)


class Net(nn.Module):
    def __init__(self, update: Update, plain: bool = True, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(update, plain) for _ in range(depth)).double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def highway(m: Block, x: Tensor) -> Tensor:
    t = torch.sigmoid(m.gate(x))
    return t * torch.relu(m.h(x)) + (1 - t) * x


def gru(m: Block, x: Tensor) -> Tensor:
    z = torch.sigmoid(m.gate(x))
    return z * x + (1 - z) * torch.tanh(m.h(x))


def gru_otherwise(m: Block, x: Tensor) -> Tensor:
    z = m.gate(x).sigmoid()
    return torch.addcmul((1 - z).mul(m.h(x).tanh()), z, x)


UPDATES: dict[str, Update] = {
    "a number": lambda m, x: 0.5 * x + m.h(x),
    "a number behind": lambda m, x: m.h(x) + x * math.sqrt(2),
    "alpha": lambda m, x: torch.add(m.h(x), x, alpha=0.5),
    "subtracted": lambda m, x: m.h(x) - x,
    "negative": lambda m, x: -x + m.h(x),
    "divided": lambda m, x: x / 2 + m.h(x),
    "a parameter": lambda m, x: m.number * x + m.h(x),
    "a vector": lambda m, x: m.scale * x + m.h(x),
    "a buffer": lambda m, x: x * m.alpha + m.h(x),
    "a computed vector": lambda m, x: x * torch.sigmoid(m.scale) + m.h(x),
    "both scaled": lambda m, x: m.scale * x + m.number * m.h(x),
    "two branches": lambda m, x: m.scale * x + m.h(x) + m.gate(x),
    "highway": highway,
    "gru": gru,
    "addcmul": gru_otherwise,
    "addcmul of the skip": lambda m, x: torch.addcmul(m.h(x), m.scale, x, value=0.5),
    "lerp": lambda m, x: torch.lerp(x, m.h(x), torch.sigmoid(m.gate(x))),
    "lerp backwards": lambda m, x: m.h(x).lerp(x, torch.sigmoid(m.gate(x))),
    "lerp by a number": lambda m, x: torch.lerp(x, m.h(x), 0.25),
    "a gate of its own": lambda m, x: torch.sigmoid(m.scale) * x + (1 - torch.sigmoid(m.scale)) * m.h(x),
}


def example() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, D, dtype=torch.float64)


def maps(net: Net) -> list[Callable[[Tensor], Tensor]]:
    steps: list[Callable[[Tensor], Tensor]] = []
    for block in net.blocks:
        if block.plain:
            steps.append(lambda x, block=block: x + block.f(x))
        steps.append(lambda x, block=block: block.update(block, x))
    return steps


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_in_a_chain_with_plain_steps(update: Update) -> None:
    net, x = Net(update), example()
    result = rewrite_model(net, x)
    (chain,) = result.chains
    assert [step.kind for step in chain.steps] == ["residual", "map"] * 3
    assert torch.equal(result.run(x, gamma=0), net(x))
    torch.testing.assert_close(result.run(x, gamma=0.9), momentum_reference(maps(net), x, 0.9, "map").output)


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_alone_where_asked_for(update: Update) -> None:
    net, x = Net(update, plain=False), example()
    result = rewrite_model(net, x)
    assert not result.chains
    assert "no plain step" in " ".join(result.reasons.values())
    result = rewrite_model(net, x, selection=Selection(only=("blocks",)))
    (chain,) = result.chains
    assert [step.kind for step in chain.steps] == ["map"] * 3
    assert torch.equal(result.run(x, gamma=0), net(x))
    torch.testing.assert_close(result.run(x, gamma=0.9), momentum_reference(maps(net), x, 0.9, "map").output)


class DeepNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fs, self.norms = (
            nn.ModuleList(make(D) for _ in range(3)) for make in (lambda d: nn.Linear(d, d), nn.LayerNorm)
        )

    def forward(self, x: Tensor) -> Tensor:
        for f, norm in zip(self.fs, self.norms, strict=True):
            x = norm(1.5 * x + f(x))
        return x


def test_deep_norm() -> None:
    net, x = DeepNorm().double(), example()
    assert not rewrite_model(net, x).chains
    result = rewrite_model(net, x, selection=Selection(only=("fs",)))
    assert [len(chain.steps) for chain in result.chains] == [3]
    steps = [lambda x, f=f, norm=norm: norm(1.5 * x + f(x)) for f, norm in zip(net.fs, net.norms, strict=True)]
    assert torch.equal(result.run(x, gamma=0), net(x))
    torch.testing.assert_close(result.run(x, gamma=0.9), momentum_reference(steps, x, 0.9, "map").output)


class Unrolled(nn.Module):
    """A GRU over time, written out; its first step is a plain one."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.gate, self.h = nn.Linear(D, D), nn.Linear(D, D)
        self.functional = functional

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias) if self.functional else layer(x)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0]
        state = first + first.tanh()
        for t in range(3):
            z = torch.sigmoid(self.linear(self.gate, state + x[:, t]))
            state = z * state + (1 - z) * torch.tanh(self.linear(self.h, state) + x[:, t])
        return state


@pytest.mark.parametrize("functional", [False, True])
def test_a_recurrence_over_time_is_no_depth(functional: bool) -> None:
    net, x = Unrolled(functional).double(), example()
    with pytest.raises(MfxError, match=r"fits no chain.*Chains: none"):
        rewrite_model(net, x, selection=Selection(only=("*",)))
    result = rewrite_model(net, x)
    assert not result.chains
    reasons = [reason for reason in result.reasons.values() if "is read in another step, too" in reason]
    assert len(reasons) == 3
    assert torch.equal(result.run(x, gamma=0), net(x))


class Rotary(nn.Module):
    """Sums that only look like it: a plain chain is as it was beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.fs = nn.Linear(D, D), nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.register_buffer("cos", torch.rand(3, D))

    def forward(self, x: Tensor) -> Tensor:
        start = x
        for f in self.fs:
            q = self.q(x)
            x = x + f(q * self.cos + q.roll(1, -1) * (1 - self.cos))
        return 0.5 * start + x


def test_other_sums_of_products_change_no_plain_chain() -> None:
    net, x = Rotary().double(), example()
    result = rewrite_model(net, x)
    assert [(len(chain.steps), {step.kind for step in chain.steps}) for chain in result.chains] == [(3, {"residual"})]
    assert torch.equal(result.run(x, gamma=0), net(x))
