"""A model that decides on values, on a device: it waits for a condition as the model itself does."""

import pytest
from torch import nn

from tests.accelerator import device as fake
from tests.accelerator.nets import Block, batch, momentumized, stack


class Decides(nn.Module):
    def __init__(self, conditions):
        super().__init__()
        self.parts = nn.ModuleList(stack(Block, depth=3) for _ in range(conditions + 1))

    def forward(self, x):
        for number, part in enumerate(self.parts):
            if number and x.abs().max() > 1e6:
                x = x / 2
            for block in part:
                x = block(x)
        return x


@pytest.mark.parametrize("conditions", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_conditions_wait_for_the_device_as_often_as_in_the_model(gamma, conditions):
    model = fake.to_device(Decides(conditions))
    net, x = momentumized(Decides(conditions), gamma=gamma), fake.to_device(batch())
    net(x).sum().backward()  # makes the graph
    fake.backend.arrive()
    waited = []
    for module in (model, net):
        fake.forget()
        module(x).sum().backward()
        waited.append(list(fake.SYNCHRONISATIONS))
        assert fake.FROM_HOST == []
    assert waited[0] == waited[1]
    assert len(waited[0]) >= conditions
