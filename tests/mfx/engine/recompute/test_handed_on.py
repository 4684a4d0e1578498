"""A size that one branch computed, and a later one reads."""

from dataclasses import replace

import pytest
import torch

from mfx.engine.arithmetic.floating import predict
from mfx.options.gamma import Gamma
from tests.mfx.engine.chains import WIDTH, make_root, make_steps, run


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_later_step_reads_the_size_in_both_runs(gamma, arithmetic):
    root = make_root(10)
    seen = []

    def call(f, x, *sizes):
        seen.append(sizes)
        return (f(x) * (sizes[-1] if sizes else 1), x.shape[0] + 3)

    steps = make_steps(root, call=call)
    steps[4] = replace(steps[4], captures=(1 + 2,))  # one capture of the chain, then step 2's size
    results = []
    for budget in (0.0, 1.0):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = run(root, steps, x, (None,), gamma=gamma, arithmetic=arithmetic, memory_budget=budget)
        assert out.sides == ((8,),) * 10
        out.x.sum().backward()
        results.append((out.x.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    found, expected = results[0][1], results[1][1]
    if arithmetic == "exact" or gamma == 0:
        assert torch.equal(found, expected)
    else:  # the error in the first of ten rebuilt states, which a few tanh layers do not enlarge much: ten times
        rebuilt_to = predict(Gamma.of(gamma), torch.float32, 10).error
        assert (found - expected).abs().max() <= 10 * rebuilt_to * expected.abs().max()
    assert seen.count((8,)) == 3  # forward and recomputation, and the forward that keeps all
