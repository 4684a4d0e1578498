"""γ as training goes on, and what travels with a checkpoint."""

import json
import math
from itertools import pairwise

import pytest
import torch

import mfx
from mfx.options.gamma import Gamma
from mfx.schedule import cosine, linear
from tests.mfx.models import Stack, inputs, stack_recurrence

TOLERANCE = {"rtol": 2e-8, "atol": 2e-8}  # n·2⁻⁴⁰·T^1.5 with n < 1024, T = 6 is 1.4e-8


def gamma_of(net):
    (chain,) = mfx.explain(net).chains
    return chain.gamma


def test_training_follows_the_recurrence_at_every_steps_gamma():
    torch.manual_seed(0)
    model, reference = Stack().double(), Stack().double()
    reference.load_state_dict(model.state_dict())
    net, x = mfx.momentumize(model, gamma=0.0), inputs(dtype=torch.float64)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (net, reference))
    scheduler = mfx.GammaScheduler(net, linear(steps=5))
    for gamma in (0.0, 184 / 1024, 369 / 1024, 553 / 1024, 737 / 1024, 0.9, 0.9):  # 0.18, 0.36, … in 1024ths
        assert gamma_of(net) == gamma
        for function, opt in ((net, optimizer), (lambda x, g=gamma: stack_recurrence(reference, x, g), other)):
            opt.zero_grad()
            function(x).square().sum().backward()
            opt.step()
        scheduler.step()
    torch.testing.assert_close(dict(net.state_dict()), dict(reference.state_dict()), **TOLERANCE)


def test_steps_count_from_zero():
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5 / (1 + step)

    net = mfx.momentumize(Stack(), gamma=0.9)
    scheduler = mfx.GammaScheduler(net, schedule)
    assert (scheduler.last_step, scheduler.get_last_gamma(), gamma_of(net)) == (0, 0.5, 0.5)
    scheduler.step()
    assert (scheduler.last_step, scheduler.get_last_gamma(), gamma_of(net)) == (1, 0.25, 0.25)
    assert asked == [0, 1]


def test_by_chain():
    net = mfx.momentumize(Stack())
    scheduler = mfx.GammaScheduler(net, lambda step: {"blocks": step / 4})
    scheduler.step()
    assert gamma_of(net) == 0.25
    assert scheduler.get_last_gamma() == {"blocks": 0.25}
    assert json.loads(json.dumps(scheduler.state_dict())) == {"last_step": 1, "gamma": {"blocks": 0.25}}


@pytest.mark.parametrize(
    "schedule, expected", [(linear(steps=10), 461 / 1024), (lambda step: {"blocks": step / 20}, 0.25)]
)
def test_resuming(schedule, expected):
    scheduler = mfx.GammaScheduler(mfx.momentumize(Stack()), schedule)
    for _ in range(4):
        scheduler.step()
    state = json.loads(json.dumps(scheduler.state_dict()))
    net = mfx.momentumize(Stack())
    resumed = mfx.GammaScheduler(net, schedule)
    assert gamma_of(net) == 0.0
    resumed.load_state_dict(state)
    assert gamma_of(net) == gamma_of(scheduler.net)
    for each in (scheduler, resumed):
        each.step()
    assert gamma_of(net) == gamma_of(scheduler.net) == expected
    assert resumed.state_dict() == scheduler.state_dict()


def test_a_step_that_is_refused_leaves_all_as_it_was():
    net = mfx.momentumize(Stack())
    scheduler = mfx.GammaScheduler(net, lambda step: (0.5, 1e-9, 0.25)[step])
    with pytest.raises(mfx.MfxError, match=r"cannot be told from 0; the nearest gamma that works is 1/16384"):
        scheduler.step()
    assert (scheduler.last_step, gamma_of(net)) == (0, 0.5)


@pytest.mark.parametrize("shape", [linear, cosine])
@pytest.mark.parametrize("start, end", [(0.0, 0.9), (1 / 1024, 0.9), (0.9, 0.0), (0.5, 0.9999), (0.3, 0.3)])
@pytest.mark.parametrize("steps", [1, 2, 7, 5000])
def test_annealing(shape, start, end, steps):
    schedule = shape(steps, start, end)
    values = [schedule(step) for step in range(steps + 3)]
    assert values[0] == start
    assert values[steps:] == [end] * 3
    assert all((a <= b) if start <= end else (a >= b) for a, b in pairwise(values))
    for step, value in enumerate(values[:steps]):
        part = step / steps if shape is linear else math.sin(math.pi * step / steps / 2) ** 2
        # to the nearest multiple of 1/1024, or to an end
        assert abs(value - (start + part * (end - start))) <= 1 / 2048 + 1e-12
        assert Gamma.of(value).denominator <= 1024 or value in (start, end)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: linear(0), "steps=0: a schedule takes a whole number of steps"),
        (lambda: cosine(2.5), r"steps=2\.5"),
        (lambda: linear(True), "steps=True"),
        (lambda: linear(10, end=1.0), "gamma must be a real number"),
        (lambda: cosine(10, start=1e-7), "nearest gamma that works"),
        (lambda: mfx.GammaScheduler(mfx.momentumize(Stack()), 0.5), r"schedule=0\.5: a function from the number"),
        (lambda: mfx.GammaScheduler(Stack(), linear(10)), "has not been momentumized"),
        (lambda: mfx.GammaScheduler(mfx.momentumize(Stack()), lambda step: None), "gamma must be .* not None"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(mfx.MfxError, match=message):
        make()
