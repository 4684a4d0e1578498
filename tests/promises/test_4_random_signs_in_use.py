"""gamma=mfx.BDIA in what people do with nets: copies, mappings, second derivatives, checkpoints, evaluation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mfx
from tests.promises.test_4_random_signs import DEPTH, WIDTH, Outer, Stack, batch, by_hand, train


class Two(nn.Module):
    """Three chains of different lengths; a value decides on whether the second one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Stack(depth=13, dropout=0.1), Stack(depth=5), Stack(depth=14)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if x.sum() > 0:
            x = torch.tanh(self.b(x))
        return self.c(x)


def trained(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one step, of the parameters that took part."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    y = net(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *net.parameters()], allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_draws_what_the_net_draws_and_has_a_gamma_of_its_own(copied: Callable[[Any], Any], called: bool) -> None:
    model = Stack()
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample"))
    expected = train(mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample")), batch())
    if called:
        net(batch())
    other = copied(net)
    assert same(train(other, batch()), expected)
    assert torch.equal(other.eval()(batch()), model(batch()))
    other.train()  # a shallow copy has the same submodules
    mfx.set_gamma(other, 0.5)
    assert same(train(net, batch()), expected)


def test_chains_with_signs_beside_others_and_paths_that_values_decide() -> None:
    model = Two()
    gamma: dict[str, Any] = {"a*": mfx.BDIA(0.25, "sample"), "*": "auto"}
    net = mfx.momentumize(model, gamma=gamma, verify="raise")
    kept = mfx.momentumize(model, gamma={"a*": mfx.BDIA(0.25, "sample"), "c*": 0.9, "*": 0}, memory_budget=1.0)
    for x in (batch(), -batch(), batch() + 1, batch() - 1, batch()):
        assert same(trained(net, x), trained(kept, x))
    model.a.eval(), net.a.eval()
    plain = mfx.momentumize(model, gamma={"c*": 0.9, "*": 0})
    assert same(trained(net, batch()), trained(plain, batch()))


@pytest.mark.parametrize("kind", ["residual", "map"])
@pytest.mark.parametrize("per", ["call", "sample"])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_second_derivatives_are_those_of_the_recurrence(arithmetic: str, per: str, kind: str) -> None:
    model = Stack(kind).double()
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25, per), arithmetic=arithmetic, verify="raise")
    found = []
    for forward in (net, lambda x: by_hand(model, x, 0.25, per)):
        torch.manual_seed(2)
        x = batch(torch.float64).requires_grad_()
        (g,) = torch.autograd.grad(forward(x).pow(3).sum(), x, create_graph=True)
        weights = [block[0].weight for block in model.body.blocks]
        found.append(torch.autograd.grad(g.square().sum(), [x, *weights]))
    # Fixed point has 2⁻⁴⁰, which a step enlarges by 2 at most: 14 steps, twice.
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-7)


def test_a_graph_that_is_walked_twice() -> None:
    net = mfx.momentumize(Outer(), gamma=mfx.BDIA(0.25), verify="raise")
    x = batch().requires_grad_()
    y = net(x).square().sum()
    first = torch.autograd.grad(y, [x, *net.parameters()], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, [x, *net.parameters()])))


def test_a_checkpoint_around_the_net_and_autocast() -> None:
    model = Stack(dropout=0.1)
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample"), verify="raise")
    kept = mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample"), memory_budget=1.0)
    whole = nn.Module()
    whole.net = net
    whole.forward = lambda x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    assert same(trained(whole, batch()), trained(kept, batch()))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(trained(net, batch()), trained(kept, batch()))


class Turned(nn.Module):
    """A stream that is transposed between its steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = x + torch.tanh(block(x))
        x = x.transpose(0, 1)
        for block in self.second:
            x = x + torch.tanh(block(x))
        return x.transpose(0, 1)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_samples_are_the_rows_of_the_stream_as_it_begins(dim: int, arithmetic: str) -> None:
    model, x = Turned(), torch.randn(3, 40, WIDTH).transpose(0, 1).contiguous().transpose(0, 1)  # other strides
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample", dim), arithmetic=arithmetic, verify="raise")
    kept = mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample", dim), arithmetic=arithmetic, memory_budget=1.0)
    found = trained(net, x)
    assert same(found, trained(kept, x))
    torch.manual_seed(2)
    draws, shape = torch.randint(0, 2, (10, x.shape[dim])), [1, 1, 1]
    shape[dim] = -1
    state, v = x.double(), torch.zeros(())
    for t, block in enumerate([*model.first, *model.second]):
        gamma = torch.zeros(1, 1, 1) if t == 0 else ((2 * draws[t] - 1) * 0.25).view(shape)
        v = gamma * v + (1 - gamma) * torch.tanh(block(state.float())).double()
        state = state + v
    # As in `test_4_random_signs`: a few roundings a step, enlarged by the steps behind it.
    torch.testing.assert_close(found[0].double(), state, rtol=0, atol=16 * DEPTH * 2.0**-23)


class _Count(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_evaluation_costs_what_the_model_costs_and_draws_nothing() -> None:
    model = Stack(dropout=0.1).eval()
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25))
    counts = []
    with torch.no_grad():
        for whole in (model, net):
            whole(batch())
            before = torch.get_rng_state()
            with _Count() as mode:
                whole(batch())
            counts.append(mode.count)
            assert torch.equal(torch.get_rng_state(), before)
    assert counts[0] == counts[1]
