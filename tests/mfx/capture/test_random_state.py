"""A trace that drew random numbers is refused, and no generator is left where the trace left it."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import mfx


class Layers(nn.Module):
    """Drops layers as ``draw`` decides."""

    def __init__(self, draw):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.draw = draw

    def forward(self, x):
        for layer in self.layers:
            if self.draw() > 0.3:
                x = x + layer(x)
        return x


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        random.Random(0).random,
        np.random.rand,
        np.random.default_rng(0).random,
        np.random.RandomState(0).rand,
    ],
    ids=["random", "random.Random", "numpy", "numpy.Generator", "numpy.RandomState"],
)
def test_layer_drop_is_refused(draw):
    with pytest.raises(mfx.MfxError, match="draws random numbers"):
        mfx.momentumize(Layers(draw), capture="symbolic")


def test_the_generators_are_put_back():
    def states():
        return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002

    drawing, reading = Layers(lambda: random.random() + np.random.rand() + 1), Layers(lambda: torch.rand(1))  # noqa: NPY002
    before = states()
    with pytest.raises(mfx.MfxError, match="draws random numbers"):
        mfx.momentumize(drawing, capture="symbolic")
    with pytest.raises(mfx.MfxError, match="reads the value of a tensor"):
        mfx.momentumize(reading, capture="symbolic")
    assert states() == before


def test_a_generator_of_its_own():
    class Drawing(Layers):
        def forward(self, x):
            return super().forward(x * self.generator.random())

    model = Drawing(lambda: 1)
    model.generator = random.Random(3)
    state = model.generator.getstate()
    with pytest.raises(mfx.MfxError, match=r"draws random numbers \(generator\)"):
        mfx.momentumize(model, capture="symbolic")
    assert model.generator.getstate() == state
