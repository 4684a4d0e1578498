"""gamma=mfx.BDIA under backend="mfx", which guards on the training flag itself: nothing in these models reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.promises.test_4_random_signs import Outer, Stack, batch, train

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, gamma: Any, **options: Any) -> Any:
    return torch.compile(model, backend="mfx", options={"gamma": gamma, "inner": "eager", **options})


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("per", ["call", "sample"])
def test_training_then_evaluation_then_training(per: str, inner: str) -> None:
    gamma, x = mfx.BDIA(0.25, per), batch()
    net = compiled(Stack(), gamma, inner=inner, verify="raise")
    first = train(net, x)
    # An inner compiler may sum gradients in another order.
    torch.testing.assert_close(first, train(mfx.momentumize(Stack(), gamma=gamma), x), rtol=1e-5, atol=1e-6)
    net.eval()
    assert torch.equal(net(x), Stack()(x))
    net.train()
    assert all(map(torch.equal, train(net, x), first))


def test_in_partial_evaluation() -> None:
    net, x = compiled(Stack(), mfx.BDIA(0.25)), batch()
    first = train(net, x)
    net.body.blocks.eval()
    assert torch.equal(net(x), Stack()(x))
    net.body.blocks.train()
    assert all(map(torch.equal, train(net, x), first))


def test_first_in_evaluation_and_models_of_one_class_in_different_modes() -> None:
    x, nets = batch(), [compiled(Stack().train(mode), mfx.BDIA(0.25)) for mode in (False, True)]
    plain = Stack()(x)
    for _ in range(2):
        assert torch.equal(nets[0](x), plain)
        assert not torch.equal(nets[1](x), plain)


def test_chains_in_branches() -> None:
    model = Outer()
    net = compiled(model, mfx.BDIA(0.25), verify="raise")
    found = train(net, batch())
    assert all(map(torch.equal, found, train(mfx.momentumize(Outer(), gamma=mfx.BDIA(0.25)), batch())))
    net.eval()
    assert torch.equal(net(batch()), Outer().eval()(batch()))


def test_a_function_around_a_model() -> None:
    model, x = Stack(), batch()
    function = torch.compile(lambda x: 2 * model(x), backend="mfx", options={"gamma": mfx.BDIA(0.25), "inner": "eager"})
    plain = 2 * model(x)
    assert not torch.equal(function(x), plain)
    model.eval()
    assert torch.equal(function(x), plain)


class WithoutParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + torch.tanh(x)
        return x


def test_steps_without_parameters() -> None:
    net, x = compiled(WithoutParameters(), mfx.BDIA(0.25)), batch()
    plain = WithoutParameters()(x)
    assert not torch.equal(net(x), plain)
    net.eval()
    assert torch.equal(net(x), plain)


def test_a_function_whose_owner_is_not_known() -> None:
    module = WithoutParameters()
    function = torch.compile(lambda x: module(x), backend="mfx", options={"gamma": mfx.BDIA(0.25), "inner": "eager"})
    with pytest.raises(Exception, match="needs the training flag"):
        function(batch())


def test_auto() -> None:
    x = batch()
    found = train(compiled(Stack(), "auto"), x)
    assert all(map(torch.equal, found, train(mfx.momentumize(Stack(), gamma=0.9), x)))
