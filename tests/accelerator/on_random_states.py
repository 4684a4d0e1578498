"""The generator of a device: drawn from again by a recomputation, and left as one forward pass leaves it."""

import pytest
import torch
from torch import Tensor, nn

import mfx
from mfx.modules.random_state import undisturbed
from tests.accelerator import device as fake
from tests.accelerator.nets import WIDTH, Block, batch, momentumized, stack, trained

PLACES = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


@pytest.mark.parametrize("arithmetic, gamma", PLACES)
def test_dropout_is_that_of_the_forward_pass(arithmetic, gamma):
    model = stack(lambda: Block(0.3))
    options = {"arithmetic": arithmetic, "gamma": gamma, "verify": "raise"}
    kept = trained(momentumized(model, memory_budget=1.0, **options), batch())
    rebuilt = trained(momentumized(model, **options), batch())
    other = trained(momentumized(stack(Block), memory_budget=1.0, **options), batch())
    assert not torch.equal(kept[1], other[1])  # there is something to draw
    for a, b in zip(rebuilt, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if arithmetic == "exact" else 1e-5)


class DrawsElsewhere(nn.Module):
    """A branch on the CPU that draws on the accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.inner(x)).to("fake")).to("cpu")


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_a_branch_that_draws_on_another_device_than_its_own(gamma):
    results = []
    for budget in (0.0, 1.0):
        net = mfx.momentumize(stack(DrawsElsewhere), gamma=gamma, memory_budget=budget, verify="raise")
        fake.backend.manual_seed(2)
        x = batch().requires_grad_()
        net(x).sum().backward()
        results.append(
            [x.grad, *(p.grad for p in net.parameters()), fake.on_host(torch.empty(3, device="fake").uniform_())]
        )
    assert all(map(torch.equal, *results))


def test_generators_that_a_trace_disturbs_are_named_and_put_back():
    before = fake.backend.get_rng_state()
    with undisturbed(nn.Identity()) as drawn:
        torch.empty(3, device="fake").uniform_()
    assert drawn == ["torch.fake:0"]
    assert torch.equal(fake.backend.get_rng_state(), before)
