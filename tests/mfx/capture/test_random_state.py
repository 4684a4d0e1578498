"""A trace that drew random numbers is refused, and no generator is left where the trace left it."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import mfx
from tests.sampling import grid


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


FILES = random.Random(0), np.random.default_rng(0)


class Drawing(nn.Module):
    """Blocks whose input is scaled by a drawn number."""

    def __init__(self, draw, generator=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.draw, self.generator = draw, generator

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x * self.draw(self.generator)))
        return x


DRAWN = {
    "Python": (lambda own: random.random(), lambda: None),
    "Python's Gaussian": (lambda own: random.gauss(0, 1), lambda: None),
    "numpy": (lambda own: np.random.rand(), lambda: None),  # noqa: NPY002
    "numpy, as an array": (lambda own: torch.from_numpy(np.random.rand(4).astype("f4")), lambda: None),  # noqa: NPY002
    "torch, as a number": (lambda own: torch.rand(()).item(), lambda: None),
    "a generator of the file's": (lambda own: FILES[0].random(), lambda: None),
    "a numpy generator of the file's": (lambda own: FILES[1].random(), lambda: None),
    "a generator of its own": (lambda own: own.random(), lambda: random.Random(3)),
    "a numpy generator of its own": (lambda own: own.random(), lambda: np.random.default_rng(3)),
    "a torch generator of its own": (
        lambda own: torch.rand(4, generator=own),
        lambda: torch.Generator().manual_seed(3),
    ),
}


def three_steps(net, generator):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    FILES[0].seed(1)
    FILES[1].bit_generator.state = np.random.default_rng(1).bit_generator.state
    found = []
    for _ in range(3):
        x = torch.ones(2, 4, requires_grad=True)
        y = net(x)
        y.sum().backward()
        found += [y.detach(), x.grad, *(p.grad for p in net.parameters())]
        net.zero_grad()
    held = getattr(generator, "getstate", None) or getattr(generator, "get_state", None)
    states = [random.getstate(), FILES[0].getstate(), FILES[1].bit_generator.state, torch.get_rng_state().tolist()]
    states += [held() if held else getattr(getattr(generator, "bit_generator", None), "state", None)]
    return found, str([*states, np.random.get_state()])  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:mfx")
@grid(len(DRAWN), drawn=DRAWN, budget=[0.0, 1.0])
def test_a_net_draws_as_its_model(drawn, budget):
    draw, make = drawn
    torch.manual_seed(0)
    model = Drawing(draw, make())
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, memory_budget=budget)
    (found, states), (expected, expected_states) = three_steps(net, net.generator), three_steps(model, model.generator)
    assert all(map(torch.equal, found, expected))
    assert states == expected_states
