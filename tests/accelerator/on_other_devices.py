"""Devices that lack something, chains that lie on two, and what is chosen by measurement."""

import pytest
import torch
from torch import Tensor, nn

import mfx
from mfx.compat import modes_left
from tests.accelerator import device as fake
from tests.accelerator.nets import WIDTH, Block, batch, momentumized, stack, trained


def test_without_float64_an_error_names_the_other_arithmetic(monkeypatch):
    monkeypatch.setattr(fake.backend, "has_float64", False)
    net = momentumized(stack())
    with pytest.raises(mfx.MfxError, match=r"which fake:0 does not have\. Use arithmetic='float'"):
        net(fake.to_device(batch()))
    trained(momentumized(stack(), arithmetic="float"), batch())
    trained(momentumized(stack(), gamma=0.0), batch())


class Moves(nn.Module):
    """Two blocks on the CPU and then three on the device, as a device map places them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block() for _ in range(2))
        self.second = nn.ModuleList(fake.to_device(Block()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = block(x)
        x = x.to("fake")
        for block in self.second:
            x = block(x)
        return x


def test_a_chain_ends_where_the_stream_moves_to_another_device():
    torch.manual_seed(0)
    model = Moves()
    x = batch()
    with pytest.warns(UserWarning, match=r"second\.0 .* changes the stream from .* on cpu to .* on fake:0"):
        net = mfx.momentumize(model, gamma=0.0, example_inputs=(x,))
    y = net(x)
    assert torch.equal(fake.on_host(y), fake.on_host(model(x)))
    explanation = mfx.explain(net)
    assert [len(chain.steps) for chain in explanation.chains] == [2, 2]


def test_modes_are_put_back_on_the_accelerator_too():
    before = torch.is_autocast_enabled("fake")

    def fail() -> None:
        with modes_left():
            torch.autocast("fake", dtype=torch.bfloat16).__enter__()
            raise ValueError("fails")

    with pytest.raises(ValueError, match="fails"):
        fail()
    assert torch.is_autocast_enabled("fake") == before


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_algorithms_are_not_chosen_by_measurement_in_a_branch_that_runs_twice(gamma):
    seen = []

    class Convolves(Block):
        def __init__(self) -> None:
            super().__init__()
            self.a.register_forward_pre_hook(
                lambda *args: seen.append((mfx.recomputing(), torch.backends.cudnn.benchmark))
            )

    net = momentumized(stack(Convolves), gamma=gamma)
    torch.backends.cudnn.benchmark = True
    try:
        trained(net, batch())
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
    assert {measured for _, measured in seen} == {False}
    assert len(seen) > len(net) > WIDTH
