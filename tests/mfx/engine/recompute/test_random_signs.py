import random
from functools import partial

import numpy as np
import pytest
import torch

from mfx.compat import sign_of_numpy, sign_of_python, sign_of_torch, sign_reader
from mfx.engine.recompute.random_clock import RandomClock
from mfx.modules.random_state import Generator

FINDS = {"torch": sign_of_torch, "random": sign_of_python, "numpy": sign_of_numpy}
SIGNS = {name: lambda find=find: sign_reader([find()])() for name, find in FINDS.items()}
SEEDS = {"torch": torch.manual_seed, "random": random.seed, "numpy": np.random.seed}
DRAWS = {
    "torch": [
        lambda: torch.rand(1),
        lambda: torch.randn(1),  # every other one is a spare Gaussian
        lambda: torch.randn(1, dtype=torch.float64),
        lambda: torch.empty(1).exponential_(),
        lambda: torch.randperm(3),
        lambda: torch.rand(624),
    ],
    "random": [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: random.getrandbits(32),
        lambda: random.randbytes(2496),
    ],
    "numpy": [np.random.rand, np.random.randn, partial(np.random.rand, 2), partial(np.random.rand, 312)],
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_tells_seeds_apart(name):
    signs = set()
    for number in range(50):
        SEEDS[name](number)
        signs.add(SIGNS[name]())
    assert len(signs) == 50


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_changes_with_every_draw_and_else_stays(name):
    SEEDS[name](0)
    for draw in DRAWS[name] * 8:
        before = SIGNS[name]()
        assert before is not None
        assert SIGNS[name]() == before
        draw()
        assert SIGNS[name]() != before


def test_a_state_that_is_put_back_is_no_draw_and_is_read_once():
    reads = []

    def read():
        reads.append(1)
        return torch.get_rng_state()

    clock = RandomClock([Generator("torch", read, torch.set_rng_state, sign_of_torch)])
    state = torch.get_rng_state()
    torch.randn(1)
    torch.set_rng_state(state)
    assert not clock.tick()
    count = len(reads)
    assert not clock.tick()
    assert len(reads) == count
    torch.rand(1)
    assert [draw.generator.name for draw in clock.tick()] == ["torch"]


def test_numpys_generator_may_get_other_bits():
    clock = RandomClock(
        [Generator("numpy", partial(np.random.get_state, legacy=False), np.random.set_state, sign_of_numpy)]
    )
    before, draw = np.random.get_bit_generator(), DRAWS["numpy"][0]
    try:
        np.random.set_bit_generator(np.random.MT19937(1))
        assert clock.tick()
        draw()
        assert clock.tick()
        assert not clock.tick()
        np.random.set_bit_generator(np.random.PCG64(1))  # of which no sign is known
        draw()
        assert clock.tick()
        draw()
        assert clock.tick()
    finally:
        np.random.set_bit_generator(before)
