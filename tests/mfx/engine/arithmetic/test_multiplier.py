"""The factors of states: as numbers would be, and kept from step to step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mfx
from examples.benchmarks.blocks import Residual
from mfx.engine.arithmetic.signed import _kept_number, carried_by, multiplier, value_of
from mfx.options.gamma import Gamma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.9, 0.1, 0.875, 0.999, 0])
def test_products_and_quotients_are_those_with_a_number(gamma, dtype):
    x = torch.randn(4096, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 1e3
    for of in (value_of, carried_by):
        number, kept = of(Gamma.of(gamma)), multiplier(Gamma.of(gamma), of, x)
        assert isinstance(kept, torch.Tensor)
        assert torch.equal(x * kept, x * number)
        if number:
            assert torch.equal(x / kept, x / number)


def test_other_kinds_of_tensors_are_multiplied_with_the_number():
    for like in (torch.ones(2, device="meta"), torch.nn.Parameter(torch.ones(2))):
        assert multiplier(Gamma.of(0.9), value_of, like) == 0.9


class Seen(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_kept_number_is_made_unseen_and_outside_of_inference_mode():
    torch.manual_seed(0)
    net = mfx.momentumize(Residual(3, 4), gamma=0.83, arithmetic="float", memory_budget=1.0)
    x = torch.randn(2, 4)
    with torch.inference_mode():
        net(x)
    _kept_number.cache_clear()
    counts = []
    for _ in range(2):
        with torch.inference_mode(), Seen() as seen:
            net(x)
        counts.append(seen.count)
    assert counts[0] == counts[1]
    torch.func.grad(lambda x: net(x).sum())(x)  # autograd saves the number
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
